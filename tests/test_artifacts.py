"""Artefacts are written whole or not at all and refused where they do not fit; settings there and back."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.artifacts import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    check_content,
    hash_file,
    hash_folder,
    misfit,
    read_manifest,
    write_artifact,
)
from sagerec.config import check_fields, from_json, require, to_json
from sagerec.errors import ArtifactError, SettingsError
from sagerec.files import read_json, replace_folder, write_json


def make(target: Path, text: str = "content", kind: str = "thing", **values: Any) -> Path:
    with write_artifact(target, kind, **values) as fresh:
        (fresh / "a.txt").write_text(text)
    return target


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- writing whole or not at all ------------------------------------------------------------------------------------


def test_an_artefact_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "thing"
    with write_artifact(target, "thing") as fresh:
        assert not target.exists()
        assert fresh.parent == target.parent
        (fresh / "a.txt").write_text("x")
    assert names(tmp_path / "deep" / "down") == ["thing", "thing/a.txt", f"thing/{MANIFEST}"]
    assert target.stat().st_mode & 0o777 == 0o755
    assert (target / MANIFEST).stat().st_mode & 0o777 == 0o644


def test_a_new_artefact_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    make(tmp_path / "thing", "old")
    (tmp_path / "thing" / "left over.txt").write_text("x")
    with write_artifact(tmp_path / "thing", "thing") as fresh:
        (fresh / "b.txt").write_text("new")
        assert (tmp_path / "thing" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["thing", "thing/b.txt", f"thing/{MANIFEST}"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_artefact_and_no_folder_beside_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def fail(target: Path) -> None:
        with write_artifact(target, "thing") as fresh:
            (fresh / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "thing")
    assert names(tmp_path) == []
    make(tmp_path / "thing", "old")
    before = hash_folder(tmp_path / "thing")
    with pytest.raises(error):
        fail(tmp_path / "thing")
    assert names(tmp_path) == ["thing", "thing/a.txt", f"thing/{MANIFEST}"]
    assert hash_folder(tmp_path / "thing") == before


def test_a_manifest_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        make(tmp_path / "thing", settings={"when": datetime.now(UTC)})
    assert names(tmp_path) == []


def test_replace_folder_puts_files_without_a_manifest(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replace_folder(tmp_path / "c") as fresh:
            (fresh / "x").write_text(text)
    assert names(tmp_path) == ["c", "c/x"]
    assert (tmp_path / "c" / "x").read_text() == "two"


def test_what_is_no_artefact_is_never_replaced(tmp_path: Path) -> None:
    """A user's file or folder of that name stays; an empty folder holds nothing to lose."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    before = names(tmp_path)
    for name in ("file", "folder"):
        with pytest.raises(ArtifactError) as error:
            make(tmp_path / name)
        assert str(error.value) == (
            f"{tmp_path / name} exists and is not an artefact of sagerec, so it is left alone; give another place or "
            "remove it"
        )
    assert names(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert read_manifest(make(tmp_path / "empty"), "thing").kind == "thing"


# --- the manifest ---------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_the_artefact_is_and_where_it_came_from(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"rows": 1}
    begun = datetime.now(UTC).replace(microsecond=0)
    with write_artifact(
        tmp_path / "t", "thing", made_from={"log": "ab"}, settings={"x": [1, 2]}, seed=7, sizes=sizes
    ) as fresh:
        (fresh / "a.txt").write_text("content")
        sizes["columns"] = 2  # known only once the work is done
    manifest = read_manifest(tmp_path / "t", "thing")
    assert (manifest.kind, manifest.made_from, manifest.settings) == ("thing", {"log": "ab"}, {"x": [1, 2]})
    assert (manifest.seed, manifest.sizes) == (7, {"rows": 1, "columns": 2})
    assert manifest.content_hash == hash_folder(tmp_path / "t")
    assert manifest.format_version == FORMAT_VERSION == 2
    assert set(manifest.versions) == {
        "python", "machine", "sagerec", "torch", "numpy", "polars", "scikit-learn", "faiss-cpu"
    }  # fmt: skip
    assert all(manifest.versions.values())
    assert begun <= datetime.fromisoformat(manifest.created) <= datetime.now(UTC)
    assert set(json.loads((tmp_path / "t" / MANIFEST).read_text())) == {field.name for field in fields(Manifest)}


def test_what_is_not_said_is_empty(tmp_path: Path) -> None:
    manifest = read_manifest(make(tmp_path / "t"), "thing")
    assert (manifest.made_from, manifest.settings, manifest.sizes, manifest.seed) == ({}, {}, {}, None)


def spoil(target: Path, **values: Any) -> None:
    """Overwrite fields of a manifest; None removes one."""
    manifest = json.loads((target / MANIFEST).read_text()) | values
    (target / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError) as error:
            read_manifest(folder, "split")
        assert str(error.value) == (
            f"{folder} is not a split artefact: it has no manifest.json; run the stage that makes it"
        )


def test_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        read_manifest(make(tmp_path / "t", kind="policy"), "split")
    assert str(error.value) == f"{tmp_path}/t holds a 'policy' artefact, expected 'split'"


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_version(tmp_path: Path, version: Any) -> None:
    spoil(make(tmp_path / "t"), format_version=version)
    with pytest.raises(ArtifactError) as error:
        read_manifest(tmp_path / "t", "thing")
    assert str(error.value) == f"{tmp_path}/t has format version {version}, this version reads 2; make it again"


@pytest.mark.parametrize(
    "values", [{"colour": "red"}, {"kind": None}, {"sizes": {"rows": 9}}, {"seed": "7"}, {"hashes": []}]
)
def test_an_edited_manifest(tmp_path: Path, values: dict[str, Any]) -> None:
    spoil(make(tmp_path / "t"), **values)
    with pytest.raises(ArtifactError) as error:
        read_manifest(tmp_path / "t", "thing")
    assert str(error.value) == f"{tmp_path}/t/manifest.json was changed after it was written; make the artefact again"


def test_a_file_is_compared_by_its_hash_where_its_time_is_another(tmp_path: Path) -> None:
    """And by size and time alone where these are as they were, so that opening costs nothing."""
    path = make(tmp_path / "t") / "a.txt"
    before, text = path.stat(), path.read_text()
    path.touch()
    read_manifest(tmp_path / "t", "thing")
    path.write_text(text.swapcase())
    with pytest.raises(ArtifactError, match=r"a\.txt was changed after it was written"):
        read_manifest(tmp_path / "t", "thing")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest = read_manifest(tmp_path / "t", "thing")
    with pytest.raises(ArtifactError, match="was changed"):
        check_content(tmp_path / "t", manifest)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"a\.txt cannot be read \(No such file"):
        read_manifest(tmp_path / "t", "thing")


@pytest.mark.parametrize("text", ["[]", '"thing"', "3", "null"])
def test_a_manifest_that_is_no_object(tmp_path: Path, text: str) -> None:
    (make(tmp_path / "t") / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError) as error:
        read_manifest(tmp_path / "t", "thing")
    assert str(error.value) == f"{tmp_path}/t/manifest.json holds no JSON object; make the artefact again"


# --- hashes ---------------------------------------------------------------------------------------------------------


def test_hash_of_a_file_by_hand(tmp_path: Path) -> None:
    """SHA-256 of `abc` from FIPS 180-2, appendix B.1."""
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def move_down(folder: Path, name: str) -> None:
    (folder / "deep").mkdir()
    (folder / "a.txt").rename(folder / "deep" / name)


def add(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda f: (f / "a.txt").write_text("Content"),
    "an added byte": lambda f: (f / "a.txt").write_text("content "),
    "a name": lambda f: (f / "a.txt").rename(f / "b.txt"),
    "a place": lambda f: move_down(f, "a.txt"),
    "a new file": lambda f: add(f / "empty"),
    "a lost file": lambda f: (f / "a.txt").unlink(),
    "a manifest further down": lambda f: add(f / "deep" / MANIFEST),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_has_another_hash_and_is_refused(tmp_path: Path, change: str) -> None:
    folder = make(tmp_path / "t")
    manifest = read_manifest(folder, "thing")
    check_content(folder, manifest)
    CHANGES[change](folder)
    assert hash_folder(folder) != manifest.content_hash
    with pytest.raises(ArtifactError) as error:
        check_content(folder, manifest)
    assert str(error.value) == f"{folder} was changed after it was written; make it again"


def test_the_hash_depends_on_neither_the_manifest_nor_the_place_nor_the_order(tmp_path: Path) -> None:
    """But two files that swap their contents are a change."""
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    for folder, order in ((one, "ab"), (two, "ba"), (three, "ab")):
        folder.mkdir()
        for name in order:
            (folder / name).write_text(name if folder != three else {"a": "b", "b": "a"}[name])
    (one / MANIFEST).write_text("{}")
    assert hash_folder(one) == hash_folder(two) != hash_folder(three)


# --- misfit ---------------------------------------------------------------------------------------------------------


MADE_FROM, SETTINGS = {"dataset": "d1", "split": "s1"}, {"width": 8, "k": [1, 2]}


@pytest.mark.parametrize(
    ("given_values", "reason"),
    [
        ({}, None),
        ({"made_from": {"dataset": "d2", "split": "s1"}}, "it was made from another dataset"),
        ({"made_from": {"dataset": "d2", "split": "s2"}}, "it was made from another dataset and split"),
        ({"made_from": {"dataset": "d1", "split": "s1", "ids": "i1"}}, "it was made from another ids"),
        ({"made_from": {"dataset": "d1"}}, "it was made from another input"),
        ({"settings": {"width": 16, "k": [1, 2]}}, "its setting width is 8, not 16"),
        ({"settings": {"width": 8, "k": [1, 3]}}, "its setting k is [1, 2], not [1, 3]"),
        ({"settings": {"width": 8, "k": [1, 2], "new": 0}}, "its setting new is None, not 0"),
        ({"settings": {"width": 8, "k": [1, 2], "new": None}}, "its settings are those of another version"),
        ({"settings": {"width": 8}}, "its settings are those of another version"),
        ({"seed": 4}, "its seed is 3, not 4"),
        ({"seed": None}, "its seed is 3, not None"),
        ({"kind": "policy"}, "{folder} holds a 'thing' artefact, expected 'policy'"),
        (
            {"folder": "none"},
            "{none} is not a thing artefact: it has no manifest.json; run the stage that makes it",
        ),
    ],
)
def test_misfit_reasons(tmp_path: Path, given_values: dict[str, Any], reason: str | None) -> None:
    folder = make(tmp_path / "t", made_from=MADE_FROM, settings=SETTINGS, seed=3)
    fitting: dict[str, Any] = {"made_from": MADE_FROM, "settings": SETTINGS, "seed": 3, "kind": "thing", "folder": "t"}
    values = fitting | given_values
    found = misfit(tmp_path / values.pop("folder"), values.pop("kind"), **values)
    assert found == (reason.format(folder=folder, none=tmp_path / "none") if reason else None)


# --- JSON -----------------------------------------------------------------------------------------------------------


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=json_values)
@settings(max_examples=50, deadline=None)
def test_json_there_and_back(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "deep" / "x.json", {"old": 1})
    write_json(folder / "deep" / "x.json", value)
    assert read_json(folder / "deep" / "x.json") == value
    assert names(folder) == ["deep", "deep/x.json"]
    shutil.rmtree(folder)


def test_json_that_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "x.json", [1, {2}])
    assert names(tmp_path) == ["x.json"]
    assert read_json(tmp_path / "x.json") == [1]


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ArtifactError) as error:
        read_json(path)
    assert str(error.value) == f"{path} is missing"
    for content in (b"", b"{", b'{"a": 1} tail', b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError) as error:
            read_json(path)
        assert re.fullmatch(
            rf"{path} is not JSON \(.+\); remove it and run the stage again", str(error.value), re.DOTALL
        )


# --- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of every kind of value."""

    size: int = 3
    scheme: Literal["fast", "slow"] = "fast"
    k: tuple[int, ...] = (1, 2)
    name: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.size > 0, f"size is {self.size}; expected above 0")


def test_settings_there_and_back() -> None:
    """Tuples are lists in JSON and tuples again."""
    chosen = Settings(size=5, scheme="slow", k=(7,), name="x")
    assert to_json(chosen) == {"size": 5, "scheme": "slow", "k": [7], "name": "x"}
    assert from_json(Settings, json.loads(json.dumps(to_json(chosen)))) == chosen
    assert to_json(Settings(k=()))["k"] == []
    assert from_json(Settings, to_json(Settings(k=()))) == Settings(k=())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1, "beta": 2}, "Settings: unknown setting 'beta'; expected some of size, scheme, k, name"),
        ({"scheme": None}, "Settings: setting 'scheme' is missing; expected all of size, scheme, k, name"),
        ({"size": 0}, "size is 0; expected above 0"),
        ({"size": "3"}, "size is '3'; expected a whole number"),
        ({"scheme": "medium"}, "scheme is 'medium'; expected one of fast, slow"),
    ],
)
def test_settings_that_cannot_be_read(values: dict[str, Any], message: str) -> None:
    """None takes the setting away."""
    changed = to_json(Settings(name="x")) | values
    with pytest.raises(SettingsError) as error:
        from_json(Settings, {k: v for k, v in changed.items() if v is not None})
    assert str(error.value) == message


def test_a_value_out_of_range_is_refused_on_construction() -> None:
    with pytest.raises(SettingsError, match=r"^size is -1; expected above 0$"):
        Settings(size=-1)
    with pytest.raises(SettingsError, match=r"^scheme is 'other'; expected one of fast, slow$"):
        Settings(scheme="other")  # type: ignore[arg-type]
