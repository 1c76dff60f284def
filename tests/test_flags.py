"""Hostile command lines: every numeric setting of every command out of its range; an operating system that refuses."""

import dataclasses
import os
import re
import resource
import signal
import subprocess
import sys
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagerec.cli import COMMANDS, main
from sagerec.errors import SettingsError
from sagerec.run.folder import Run
from tests.conftest import ENVIRONMENT
from tests.kills import leftovers

WORDS = {
    "simulate": ["FILE", "--users", "20", "--items", "200"],
    "import": ["table", "absent.csv", "--out", "x"],
    "fetch": [
        "All_Beauty",
        "--out",
        "x",
        "--base-url",
        "http://127.0.0.1:9",
        "--attempts",
        "1",
        "--pause-seconds",
        "0",
    ],
    "export": ["absent", "--out", "x"],
    "inspect": ["absent"],
    "run": ["absent", "--out", "x"],
    "prepare": ["absent", "--out", "x"],
    "ids": ["absent"],
    "lm new": ["--dataset", "absent", "--out", "x"],
    "train": ["absent"],
    "align": ["absent"],
    "compare": ["absent", "--out", "x"],
    "evaluate": ["absent"],
    "baseline": ["absent", "sasrec"],
    "diagnose": ["absent"],
    "recommend": ["absent", "--history", "a"],
    "recif evaluate": ["--benchmark", "absent", "--out", "x", "--predictions", "absent"],
    "recif simulate": ["--out", "FILE", "--users", "20", "--videos", "60", "--ads", "60", "--products", "60"],
    "serve": ["absent"],
}
"""Commands with numeric settings, and the least that they ask for; nothing of it is there."""
VALUES = ("0", "-1", "1" + "0" * 30, "1e308", "nan", "inf", "word", "")


def numeric_flags(cls: type, prefix: str = "") -> Iterator[tuple[type, str, str]]:
    """(dataclass, field, flag) of every numeric setting of a command."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(inner):
            flat = inner is not hint
            yield from numeric_flags(typing.cast(type, inner), prefix if flat else f"{prefix}{field.name}.")
        elif {int, float} & {inner, *typing.get_args(inner)}:
            yield cls, field.name, f"--{prefix}{field.name}".replace("_", "-")


FLAGS = [
    (command, cls, field, flag)
    for command, made in COMMANDS.items()
    for cls, field, flag in numeric_flags(typing.cast(type, made))
]


def test_every_command_with_numeric_settings_is_tried() -> None:
    assert {command for command, *_ in FLAGS} == set(WORDS)
    assert len(FLAGS) > 200


@pytest.mark.parametrize("command", list(WORDS))
def test_a_hostile_flag_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two values of each flag, all over the flags: status 2 and the flag, or it is taken and the data is missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("not a store")
    for name, _, field, flag in FLAGS:
        if name != command:
            continue
        for offset in range(2):
            value = VALUES[(zlib.crc32(flag.encode()) + offset * 3) % len(VALUES)]
            words = list(WORDS[command])
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
            status = main([*command.split(), *words, f"{flag}={value}"])
            lines = capsys.readouterr().err.splitlines()
            said = [line for line in lines if line.startswith("error: ")]
            assert status in (1, 2), (flag, value, lines)
            assert len(said) == 1, (flag, value, lines)
            assert "Traceback" not in "".join(lines)
            assert status == 1 or field.replace("_", "-") in said[0].replace("_", "-"), (flag, value, said)
    assert (tmp_path / "FILE").read_text() == "not a store"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("value", [0, -1, 10**30, 1e308, -1e308, float("nan"), float("inf"), "word", None, True])
def test_a_hostile_value_is_refused_by_name_or_within_range(value: object) -> None:
    """Every numeric field of every settings dataclass of the command line, constructed."""
    for cls, field in {(cls, field) for _, cls, field, _ in FLAGS}:
        required = {
            f.name: ()
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        numbers = typing.get_type_hints(cls)[field]
        given = (value,) if typing.get_origin(numbers) is tuple else value
        said = "taken"
        try:
            cls(**{**required, field: given})
        except SettingsError as error:
            said = str(error)
        may_be = value in (0, -1) or (value is None and type(None) in typing.get_args(numbers))
        if said != "taken" or not may_be:
            wanted = r".+ (is|are) .+; (expected|leave it out).*|.+: expected .+|every .+; expected .+"
            assert re.fullmatch(wanted, said), (cls.__name__, field, value, said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "x", "--out", "y", "--train.epochs", "abc"],
            "--train.epochs is 'abc'; expected INT; see: sagerec run --help",
        ),
        (["run", "x", "--out", "y", "--train.epochs", "0"], "--train.epochs is 0; expected at least 1"),
        (
            ["run", "x", "--out", "y", "--policy.width=30"],
            "--policy.width is 30; expected a multiple of twice the 2 heads",
        ),
        (["recommend", "r", "--history", "a", "-k", "0"], "-k is 0; expected at least 1"),
        (["align", "r", "--reward", "hti=1"], "unknown reward 'hti'; expected some of hit, rank"),
        (
            ["train", "r", "--train.device", "gpu9"],
            "--train.device is 'gpu9', which is not there; expected one of auto, cpu",
        ),
        (["rnu"], "Unrecognized options: rnu; see: sagerec --help"),
        ([], "Expected one of {simulate, import"),
        (["run", "x"], "Missing from sagerec run: --out PATH"),
    ],
)
def test_the_line_says_the_flag_what_was_got_and_expected(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_more_places_than_items_are_refused(small_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(small_run.folder)
    assert main(["evaluate", folder, "--k", "9999"]) == 2
    assert "--k is 9999; expected at most 200, the items of the catalogue" in capsys.readouterr().err


# --- the operating system --------------------------------------------------------------------------------------------


def limited(words: list[str], most_bytes: int) -> subprocess.CompletedProcess[str]:
    """A command where no file may grow above a size, which fails as a full disk does."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    command = [sys.executable, "-m", "sagerec.cli", *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, preexec_fn=limit)


@pytest.mark.parametrize("most_bytes", [16, 2000])
def test_a_full_disk_is_one_line_and_leaves_nothing(store_folder: Path, tmp_path: Path, most_bytes: int) -> None:
    for words in (
        ["simulate", str(tmp_path / "store"), "--users", "20", "--items", "200"],
        ["run", str(store_folder), "--out", str(tmp_path / "run")],
    ):
        done = limited(words, most_bytes)
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert (done.returncode, len(said)) == (1, 1), done.stderr
        assert "Traceback" not in done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_report_that_does_not_fit_leaves_the_old_one(small_run: Run, tmp_path: Path) -> None:
    folder = small_run.folder
    out = tmp_path / "report.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    before = out.read_text()
    done = limited(["report", str(folder), "--out", str(out)], 5000)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert out.read_text() == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [
        ["simulate", "OUT", "--users", "20", "--items", "200"],
        ["run", "STORE", "--out", "OUT"],
        ["run", "STORE", "--out", "OUT/deeper"],
        ["prepare", "STORE", "--out", "OUT"],
        ["export", "STORE", "--out", "OUT"],
        ["compare", "STORE", "--out", "OUT"],
        ["report", "RUN", "--out", "OUT"],
        ["report", "RUN", "--out", "FOLDER"],
        ["export", "STORE", "--out", "FOLDER"],
        ["simulate", "FOLDER", "--users", "20", "--items", "200"],
    ],
)
def test_out_on_a_file_or_a_folder_of_other_things_is_one_line(
    words: list[str], small_run: Run, store_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("precious")
    places = {
        "OUT": str(tmp_path / "out"),
        "OUT/deeper": str(tmp_path / "out" / "deeper"),
        "FOLDER": str(tmp_path / "folder"),
        "STORE": str(store_folder),
        "RUN": str(small_run.folder),
    }
    status = main([places.get(word, word) for word in words])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (status, len(said)) == (1, 1)
    assert (tmp_path / "out").read_text() == "precious"
    assert os.listdir(tmp_path / "folder") == ["file"]  # noqa: PTH208
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["x/../../y", "../y", "..", ".", "", "a b", "refit", "sasrec", "popularity", "é", "a-test"]
)
def test_a_name_that_is_no_component_or_taken_is_refused(
    name: str, small_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(small_run.folder)
    assert main(["align", folder, f"--name={name}"]) == 2
    if name in ("x/../../y", "../y", "..", "a b", "é"):
        for words in (
            ["evaluate", folder, f"--policy={name}"],
            ["recommend", folder, "--history=a", f"--policy={name}"],
        ):
            assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err
