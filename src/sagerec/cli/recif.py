"""Commands for RecIF-Bench."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from sagerec.cli.arguments import FLAT
from sagerec.cli.tables import console
from sagerec.config import require
from sagerec.recif.answers import RunPolicy
from sagerec.recif.evaluate import TABLE, Judge, PredictionsFile, RecifSettings, System, evaluate_systems
from sagerec.recif.judges import BertScore, Endpoint
from sagerec.recif.simulate import RecifStoreSettings
from sagerec.recif.simulated_files import write_benchmark
from sagerec.recif.tasks import read_benchmark
from sagerec.run.folder import open_run


@dataclass(frozen=True)
class RecifEvaluate:
    """Evaluate policies of a run, or files of predictions, on RecIF-Bench; writes recif.json and recif.md.

    Example: sagerec recif evaluate --benchmark benchmark_data --predictions theirs.jsonl --out RESULT
    """

    benchmark: Path
    """Folder laid out as benchmark_data: TASK/TASK_test.parquet, sid2pid.json, sid2iid.json."""
    out: Path
    """Folder for the record and the table."""
    predictions: tuple[Path, ...] = ()
    """Files of predictions, JSON lines or Parquet, each a row of the table by its name."""
    run: tuple[Path, ...] = ()
    """Run folders, of a dataset that `sagerec import recif` made; rows of several are named RUN-POLICY."""
    policy: tuple[str, ...] = ("policy",)
    """Which policies of each run, each a row of the table; later ones are compared with earlier ones."""
    unconstrained: bool = True
    """Also report what a language model writes without the trie, as the published evaluation does, as a row of its own
    named POLICY-unconstrained."""
    measure: Annotated[RecifSettings, FLAT] = field(default_factory=RecifSettings)
    """What is measured."""
    judge_folder: Path | None = None
    """Folder of an encoder, such as bert-base-chinese, for the BERTScore of item_understand and rec_reason."""
    judge_url: str = ""
    """In its place an OpenAI-compatible endpoint, such as http://localhost:8000/v1; key in SAGEREC_JUDGE_KEY."""
    judge_model: str = ""
    """Name of the endpoint's model."""
    save_predictions: bool = False
    """Also write each system's predictions, as JSON lines."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        require(
            bool(self.run or self.predictions),
            "neither --run nor --predictions is given; expected a run folder, or files of predictions",
        )
        require(bool(self.judge_url) == bool(self.judge_model), "judge_url goes with judge_model; expected both")
        require(
            self.judge_folder is None or not self.judge_url, "judge_folder and judge_url are two judges; expected one"
        )

    def __call__(self) -> None:
        benchmark = read_benchmark(self.benchmark, with_histories=bool(self.run))
        systems: list[System] = [PredictionsFile(path) for path in self.predictions]
        for folder in self.run:
            run, prefix = open_run(folder), f"{folder.resolve().name}-" if len(self.run) > 1 else ""
            for policy in (RunPolicy(run, name, self.device, prefix=prefix) for name in self.policy):
                systems += policy.ways if self.unconstrained else [policy]
        evaluate_systems(
            benchmark, systems, self.out, self.measure, judge=self.judge(), save_predictions=self.save_predictions
        )
        print_headline(self.out)

    def judge(self) -> Judge | None:
        """The judge that is asked for."""
        if self.judge_folder is not None:
            return BertScore(self.judge_folder)
        return Endpoint(self.judge_url, self.judge_model) if self.judge_url else None


@dataclass(frozen=True)
class RecifSimulate:
    """Write small files of RecIF-Bench's layout, whose law is known.

    Example: sagerec recif simulate --out RECIF --users 2000 --seed 1
    """

    out: Path
    """Folder to write."""
    store: Annotated[RecifStoreSettings, FLAT] = field(default_factory=RecifStoreSettings)
    """What is simulated."""

    def __call__(self) -> None:
        sizes = write_benchmark(self.out, self.store)
        console.print(f"{self.out}: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()), highlight=False)


def print_headline(out: Path) -> None:
    """The page's first table, and where the rest is."""
    text = (out / TABLE).read_text(encoding="utf-8")
    console.print(text.split("\n## ")[0].strip(), highlight=False, soft_wrap=True)
    console.print(f"all of it: {out / TABLE}", highlight=False)
