"""The command line: the only place that parses arguments, configures logging and prints.

Every flag is a field of a stage's settings, so a default and its help are written once.
"""

import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from polars.exceptions import PanicException
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from sagerec.cli.data import Export, Fetch, Import, Inspect, Simulate
from sagerec.cli.failures import explain, parser_line
from sagerec.cli.measure import Audit, Baseline, Compare, Diagnose, Evaluate, Recommend, Report, Results
from sagerec.cli.recif import RecifEvaluate, RecifSimulate
from sagerec.cli.serving import Serve
from sagerec.cli.stages import Align, Ids, IdsAdd, LmExport, LmNew, Prepare, RunAll, Train
from sagerec.errors import SettingsError, TrainingError
from sagerec.training import parallel
from sagerec.training.loop import choose_device

COMMANDS: dict[str, Callable[..., Callable[[], None]]] = {
    "simulate": Simulate,
    "import": Import,
    "fetch": Fetch,
    "export": Export,
    "inspect": Inspect,
    "run": RunAll,
    "prepare": Prepare,
    "ids": Ids,
    "ids add": IdsAdd,
    "lm new": LmNew,
    "lm export": LmExport,
    "train": Train,
    "align": Align,
    "compare": Compare,
    "results": Results,
    "evaluate": Evaluate,
    "baseline": Baseline,
    "diagnose": Diagnose,
    "audit": Audit,
    "recommend": Recommend,
    "serve": Serve,
    "report": Report,
    "recif evaluate": RecifEvaluate,
    "recif simulate": RecifSimulate,
}


DESCRIPTION = "Preference alignment of generative recommenders. `sagerec COMMAND --help` for the flags of one."


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the project's errors into one line. Returns the exit status."""
    logging.basicConfig(
        level=logging.INFO if parallel.rank() == 0 else logging.WARNING,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)],
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    started, command = time.perf_counter(), None
    try:
        command = parse(words)
        check_launch(command)
        check_devices(command)
        command()
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        return 130
    except BrokenPipeError:  # who reads what is printed has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, PanicException) as error:
        found = explain(error, words, while_parsing=command is None)
        if found is None:
            raise
        status, line = found
        Console(stderr=True).print(Text.assemble(("error", "bold red"), f": {line}"), soft_wrap=True)
        return status
    logging.getLogger(__name__).info("done in %.1f s", time.perf_counter() - started)
    return 0


def check_launch(command: Any) -> None:
    """Raise SettingsError where torchrun starts several processes of what one does; let its end signal be an error."""
    if (launched := parallel.launched()) == 1:
        return
    if not isinstance(command, (Train, Align, Compare)):
        name = next(name for name, made in COMMANDS.items() if made is type(command))
        raise SettingsError(
            f"torchrun starts {launched} processes of sagerec {name}, which is of one; start it without torchrun, or "
            "train and align, which share their work, or compare, which shares its jobs"
        )

    def stopped(*_: Any) -> None:
        # Of a study's jobs, that settings do not hold is a result.
        raise KeyboardInterrupt if isinstance(command, Compare) else TrainingError(parallel.LOST)

    signal.signal(signal.SIGTERM, stopped)


def check_devices(settings: Any) -> None:
    """Raise SettingsError for a device that is not there, wherever it stands in the settings, before anything runs."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "device":
            choose_device(value)
        elif dataclasses.is_dataclass(value):
            check_devices(value)


def parse(words: Sequence[str]) -> Callable[[], None]:
    """The command that the words of a command line name. Raises: SettingsError; SystemExit after `--help`."""
    words = list(words)
    if " ".join(words[:2]) in COMMANDS:
        words[:2] = [" ".join(words[:2])]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="sagerec", description=DESCRIPTION, args=words
            )
            return command
    except SystemExit as error:
        if not error.code:
            raise
        named = f" {words[0]}" if words and words[0] in COMMANDS else ""
        raise SettingsError(f"{parser_line(said.getvalue())}; see: sagerec{named} --help") from None
