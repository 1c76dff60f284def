"""The command line, tried as a user would; and frozen: a new or changed flag must be a deliberate change.

After a deliberate change: python -m tests.test_cli > tests/cli.txt
"""

import dataclasses
import typing
from pathlib import Path

import polars as pl
import pytest

from sagerec import load
from sagerec.cli import COMMANDS, main
from sagerec.cli.tables import print_examples
from sagerec.errors import DatasetError
from sagerec.recommend import Recommender
from sagerec.run.folder import Run

FROZEN = Path(__file__).parent / "cli.txt"
POSITIONAL = {
    ("simulate", "--out"),
    ("ids add", "--items"),
    ("import", "--format"),
    ("import", "--sources"),
    ("results", "--studies"),
    ("diagnose", "--names"),
}
"""Fields without a flag, beside those that are positional in every command."""


def flags(cls: type, prefix: str = "") -> list[str]:
    """`--flag = default` of a command's dataclass; flags of an `Annotated` (flat) field carry no prefix."""
    lines = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        flat = inner is not hint and dataclasses.is_dataclass(inner)
        if dataclasses.is_dataclass(inner):
            deeper = flags(typing.cast(type, inner), prefix if flat else f"{prefix}{field.name}.")
            if field.default is not dataclasses.MISSING:
                deeper.append(f"--{prefix}{field.name} = {field.default!r}")
            lines += deeper
            continue
        missing = field.default is dataclasses.MISSING
        name = f"{prefix}{field.name}".replace("_", "-")
        lines.append(f"--{name}" + ("" if missing else f" = {field.default!r}"))
    return lines


def current() -> str:
    return (
        "\n".join(f"{name} {flag}" for name, cls in COMMANDS.items() for flag in flags(typing.cast(type, cls))) + "\n"
    )


def test_flags_and_defaults_are_frozen() -> None:
    assert current() == FROZEN.read_text(encoding="utf-8"), (
        "the command line changed; if it is meant: python -m tests.test_cli > tests/cli.txt, and say so in CHANGELOG.md"
    )


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_names_every_flag_and_gives_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"Example: sagerec {command}" in printed
    for line in flags(typing.cast(type, COMMANDS[command])):
        name = line.split(" ")[0]
        if "Settings(" in line:
            continue  # the default of a whole group, which has no flag of its own
        positional = name in ("--run", "--dataset", "--name") or (command, name) in POSITIONAL
        assert positional or name in printed, name


def test_simulate_inspect_run_recommend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = str(tmp_path / "store"), str(tmp_path / "run")
    assert main(["simulate", store, "--users", "60", "--items", "200"]) == 0
    assert main(["inspect", store]) == 0
    assert "same time ties" in capsys.readouterr().out
    small = ["--ids.levels", "1", "--ids.codebook-size", "8", "--policy.width", "16", "--policy.heads", "2"]
    quick = ["--train.epochs", "1", "--evaluate.k", "5", "--evaluate.bootstrap-samples", "100", "--train.device", "cpu"]
    assert main(["run", store, "--out", out, *small, *quick, "--baselines", "popularity"]) == 0
    printed = capsys.readouterr().out
    assert "Recall" in printed
    assert "took" in printed
    assert main(["audit", out]) == 0
    assert "semantic_ids" in capsys.readouterr().out
    assert main(["evaluate", out, "--k", "3", "5", "--lists", "slate", "--bootstrap-samples", "100"]) == 0
    assert "@3" in capsys.readouterr().out
    assert main(["recommend", out, "--history", "i00000001, i00000002", "-k", "3"]) == 0
    printed = capsys.readouterr().out
    assert "score" in printed
    assert "i0000" in printed
    assert main(["recommend", out, "--history", "i00000001", "--history", "i00000002", "-k", "3"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["recommend", out]) == 1
    assert "the history is empty; expected at least one item id" in capsys.readouterr().err


def test_errors_are_one_line_and_status_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr().err
    assert "error: " in printed
    assert "is not a folder" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "sagerec run DATASET --out" in capsys.readouterr().err


def test_recommend_from_python_in_three_lines(small_run: Run) -> None:
    recommender = load(small_run.folder, device="cpu")
    history = small_run.data.item_ids.external([3, 1, 4])
    table = recommender.recommend(history, k=4)
    assert table.columns == ["rank", "item_id", "title", "score"]
    assert table["rank"].to_list() == [1, 2, 3, 4]
    assert table["score"].is_sorted(descending=True)
    assert not set(history) & set(table["item_id"])
    assert table["item_id"].n_unique() == 4
    with_history = recommender.recommend(history, k=200, exclude_history=False)
    assert set(history) <= set(with_history["item_id"])
    assert recommender.recommend(history, k=4, slate=True)["item_id"].n_unique() == 4
    everything = recommender.recommend(history, k=500)
    assert len(everything) == small_run.data.n_items - 3
    assert isinstance(table, pl.DataFrame)


def test_recommend_says_what_is_wrong(small_run: Run) -> None:
    recommender = load(small_run.folder, device="cpu")
    with pytest.raises(DatasetError, match="unknown item_id 'nope'; expected one of the 200 ids"):
        recommender.recommend(["nope"])
    with pytest.raises(DatasetError, match="the history is empty"):
        recommender.recommend([])


if __name__ == "__main__":
    print(current(), end="")


def test_brackets_in_titles_are_printed_as_they_are(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Console markup in a title is text: it neither fails nor vanishes."""
    titles = ["[/bold] cable [usb-c]"] * small_run.data.n_items
    print_examples(small_run, Recommender(small_run.policy(device="cpu"), small_run.data.item_ids, titles), users=1)
    assert "[/bold] cable [usb-c]" in capsys.readouterr().out
