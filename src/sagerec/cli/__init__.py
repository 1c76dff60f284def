"""The command line: the only place that parses arguments, configures logging and prints.

Every flag is a field of a stage's settings, so a default and its help are written once.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from sagerec.cli.data import Export, Fetch, Import, Inspect, Simulate
from sagerec.cli.measure import Audit, Baseline, Compare, Diagnose, Evaluate, Recommend, Report, Results
from sagerec.cli.stages import Align, Ids, IdsAdd, Prepare, RunAll, Train
from sagerec.errors import SagerecError

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
    "train": Train,
    "align": Align,
    "compare": Compare,
    "results": Results,
    "evaluate": Evaluate,
    "baseline": Baseline,
    "diagnose": Diagnose,
    "audit": Audit,
    "recommend": Recommend,
    "report": Report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the project's errors into one line. Returns the exit status."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)],
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    if " ".join(words[:2]) in COMMANDS:
        words[:2] = [" ".join(words[:2])]
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="sagerec",
        description="Preference alignment of generative recommenders. `sagerec COMMAND --help` for the flags of one.",
        args=words,
    )
    started = time.perf_counter()
    try:
        command()
    except SagerecError as error:
        Console(stderr=True).print(Text.assemble(("error", "bold red"), f": {error}"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        return 130
    logging.getLogger(__name__).info("done in %.1f s", time.perf_counter() - started)
    return 0
