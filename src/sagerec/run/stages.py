"""The pipeline: the stages that fill a run folder (`folder`), in their order.

A stage whose artefact is there and fits (same inputs, settings and seed) is skipped; one that does not fit is made
again, and the log says why.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from sagerec import artifacts
from sagerec.actions.registry import KINDS, ActionSettings, kind_of
from sagerec.actions.space import ActionSpace
from sagerec.actions.titles import TitleSettings
from sagerec.catalogue.audit import (
    EVENTS_USED,
    Finding,
    audit_order,
    audit_stage,
    read_events_used,
    write_events_used,
)
from sagerec.catalogue.dataset import INTERACTIONS, ITEMS, SOURCE, USERS, files_in, has_manifest, read_dataset
from sagerec.catalogue.splits import Cases, Part, SplitSettings, learnt_counts, make_split, read_split, write_split
from sagerec.config import from_json, require, to_json
from sagerec.decoding.cases import list_cases
from sagerec.errors import ArtifactError
from sagerec.evaluation.diagnose import Diagnosis, diagnose
from sagerec.evaluation.evaluate import (
    BUCKET_EDGES,
    EvaluateSettings,
    evaluate_lists,
    excludes_history,
    write_evaluation,
)
from sagerec.files import locked
from sagerec.policies.registry import (
    PolicySettings,
    describe_policy,
    make_policy,
    read_policy,
    settings_of,
    write_weights,
)
from sagerec.policies.registry import inputs as policy_inputs
from sagerec.progress import progress_bar
from sagerec.run.folder import ALL_AT_ONCE, ZERO_SHOT, Run, check_aligned_name, check_name
from sagerec.training import parallel
from sagerec.training.alignment import align_policy
from sagerec.training.checkpoints import discard_finished
from sagerec.training.loop import stage_device
from sagerec.training.settings import AS_USUAL, AlignSettings, ComputeSettings, TrainSettings
from sagerec.training.supervised import check_profiles, train_policy

logger = logging.getLogger(__name__)
AUDITED: dict[str, tuple[Part, ...]] = {
    "policy": ("train",),
    "sasrec": ("train", "align"),
    f"policy-{ALL_AT_ONCE}": ("train", "align"),
    "policy-refit": ("train", "align", "valid"),
    "sasrec-refit": ("train", "align", "valid"),
}
"""Stages that learn from the log, and the parts that each may see."""
ALIGNED_SEES: tuple[Part, ...] = ("train", "align")
"""What an aligned policy may see: the reserved events, and the training events before them as histories."""


FREE: dict[str, Literal["exact", "nearest"]] = {"free": "exact", "free-nearest": "nearest"}
"""Lists that are written without the trie -> what a text is taken for."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Settings of every stage of `sagerec run`."""

    split: SplitSettings = field(default_factory=SplitSettings)
    """How the log is divided."""
    actions: Literal["semantic-id", "text"] = "semantic-id"
    """What items are written as: semantic-id, a few codes; text, their titles, by a language model."""
    ids: ActionSettings = field(default_factory=ActionSettings)
    """How items become codes."""
    text: TitleSettings = field(default_factory=TitleSettings)
    """How titles become tokens."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    """Shape of the policy."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """How the policy is trained."""
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    """What is measured."""

    @property
    def space(self) -> Any:
        """Settings of the action space."""
        model = self.policy.model if self.actions == "text" else None
        return action_settings(self.actions, self.ids, self.text, model)


def action_settings(actions: str, ids: ActionSettings, text: TitleSettings, model: str | None) -> Any:
    """The settings of an action space; titles are written by the policy's model unless they name another."""
    return ids if actions == "semantic-id" else replace(text, model=text.model or model or "")


def prepare(dataset: Path, out: Path, settings: SplitSettings) -> Run:
    """Copy a dataset into a run folder and split it."""
    data = read_dataset(dataset)
    tables = (INTERACTIONS, ITEMS, *((USERS,) if data.profiles is not None else ()))
    source = "".join(artifacts.hash_file(dataset / name) for name in tables)
    target = out / "dataset"
    with making(target, "dataset", made_from={"source": source}, settings={}) as needed:
        if needed:
            sizes = {"users": data.n_users, "items": data.n_items, "interactions": data.n_events}
            with artifacts.write_artifact(target, "dataset", made_from={"source": source}, sizes=sizes) as fresh:
                for path in (p for p in files_in(dataset) if p.name != artifacts.MANIFEST):
                    shutil.copy(path, fresh / path.name)
                if has_manifest(dataset):
                    shutil.copy(dataset / artifacts.MANIFEST, fresh / SOURCE)
    manifest = artifacts.read_manifest(target, "dataset")
    made_from, older = {"dataset": manifest.content_hash}, {"dataset": manifest.grown_from}
    if older["dataset"]:
        data = read_dataset(target)
    with making(
        out / "split",
        "split",
        made_from=made_from,
        settings=to_json(settings),
        seed=settings.seed,
        grown_from=older,
    ) as needed:
        if needed:
            write_split(out / "split", make_split(data, settings), settings, made_from["dataset"])
    return Run(out, data, read_split(out / "split"))


def make_actions(run: Run, settings: Any) -> ActionSpace:
    """The stage that makes the action space of a run: Semantic IDs, or what `settings` belong to."""
    kind = kind_of(settings)
    for other in KINDS:
        require(
            other == kind.name or not (run.folder / other).exists(),
            f"{run.folder} writes items by {other}, and a run has one action space; make another run for {kind.name}",
        )
    folder, made_from = run.folder / kind.name, run.hashes("dataset", "split") | kind.inputs(settings)
    with making(folder, kind.name, made_from=made_from, settings=to_json(settings), seed=settings.seed) as needed:
        if needed:
            kind.build(folder, run.data, run.split.sequences(run.data, "train"), settings, made_from=made_from)
    return run.space()


def train(run: Run, policy_settings: Any, settings: TrainSettings) -> None:
    """The supervised stage of a run."""
    folder, made_from = run.folder / "policy", run.hashes("dataset", "split", run.actions)
    _train(run, folder, policy_settings, settings, ("train",), run.split.cases(run.data, "valid"), made_from)


def train_all_at_once(run: Run, policy_settings: Any, settings: TrainSettings) -> None:
    """The same on the training and the reserved events together: what an alignment on the latter must beat.

    Raises: SettingsError where no event is reserved.
    """
    require(
        run.split.counts()["align"] > 0,
        "the split reserves no event, so that all at once is what sagerec train does; expected --split.reserve event",
    )
    folder, made_from = run.folder / f"policy-{ALL_AT_ONCE}", run.hashes("dataset", "split", run.actions)
    parts: tuple[Part, ...] = ("train", "align")
    _train(run, folder, policy_settings, settings, parts, run.split.cases(run.data, "valid"), made_from)


def zero_shot(run: Run, policy_settings: Any) -> None:
    """Write a policy as it comes, trained on nothing of the run, to be measured beside what training makes of it.

    Raises: SettingsError for a kind whose fresh weights are random.
    """
    require(
        bool(_inputs(run, policy_settings)), "only a model that comes with weights has zero shots; expected causal-lm"
    )
    made_from = run.hashes("dataset", "split", run.actions) | _inputs(run, policy_settings)
    folder, resolved = run.folder / f"policy-{ZERO_SHOT}", {"policy": describe_policy(policy_settings)}
    with making(folder, "policy", made_from=made_from, settings=resolved) as needed:
        if needed:
            policy = make_policy(run.space(), policy_settings)
            check_profiles(policy, run.data.profiles)
            policy.describe(run.data.titles(range(run.data.n_items)))
            sizes = {"parameters": sum(p.numel() for p in policy.parameters()), "seconds": 0.0}
            with artifacts.write_artifact(
                folder, "policy", made_from=made_from, settings=resolved, sizes=sizes
            ) as fresh:
                write_weights(fresh, policy)
                write_events_used(fresh, np.zeros(0, dtype=np.int64))


def refit(run: Run, policy_settings: Any, settings: TrainSettings) -> None:
    """Train once more on every event but the test's, for as many epochs as were best, without validation."""
    epochs = int(run.manifest("policy").sizes["best_epoch"])
    settings = replace(settings, epochs=epochs, validate_every=0)
    folder, made_from = run.folder / "policy-refit", run.hashes("dataset", "split", run.actions, "policy")
    _train(run, folder, policy_settings, settings, ("train", "align", "valid"), None, made_from)


def _inputs(run: Run, policy_settings: Any) -> dict[str, str]:
    """Name -> content hash of what a policy of the run is made from beside what the run holds."""
    return policy_inputs(policy_settings, run.manifest(run.actions).settings)


def is_trained(run: Run, name: str, policy_settings: Any, settings: TrainSettings) -> bool:
    """Whether RUN/`name` was trained with these settings on what the run holds."""
    reason = artifacts.misfit(
        run.folder / name,
        "policy",
        made_from=run.hashes("dataset", "split", run.actions) | _inputs(run, policy_settings),
        settings=_resolved(policy_settings, settings),
        seed=settings.seed,
        grown_from=run.grown_from("dataset", run.actions),
    )
    return reason is None


def _resolved(policy_settings: Any, settings: TrainSettings) -> dict[str, Any]:
    """Settings of the supervised stage, as its manifest has them."""
    return {"policy": describe_policy(policy_settings), "train": to_json(settings)}


def _train(
    run: Run,
    folder: Path,
    policy_settings: Any,
    settings: TrainSettings,
    parts: tuple[Part, ...],
    validation: Cases | None,
    made_from: dict[str, str],
) -> None:
    """Train a policy into `folder` on the events of `parts`, unless one that fits is there."""
    stage_device(settings.device)
    resolved, older = _resolved(policy_settings, settings), run.grown_from("dataset", run.actions)
    made_from = made_from | _inputs(run, policy_settings)
    with making(
        folder, "policy", made_from=made_from, settings=resolved, seed=settings.seed, grown_from=older
    ) as needed:
        if needed:
            events = run.split.sequences(run.data, *parts)
            titles = run.data.titles(range(run.data.n_items))
            train_policy(
                folder, run.space(), events, validation, policy_settings, settings, made_from=made_from, titles=titles
            )


def aligned_from(run: Run, settings: AlignSettings) -> tuple[str, dict[str, str]]:
    """The policy of a run that an alignment starts from, and the content hashes of what the aligned one is made from.

    Raises: ArtifactError where it is missing.
    """
    start = "policy" if settings.start == "supervised" else f"policy-{ALL_AT_ONCE}"
    return start, run.hashes("dataset", "split", run.actions, start)


def _has_all_at_once(run: Run) -> bool:
    """Whether RUN/policy-all-at-once is of what the run holds, with the settings of RUN/policy but for where it ran."""
    name = f"policy-{ALL_AT_ONCE}"
    if not (run.folder / name).is_dir() or run.stale(name) is not None:
        return False
    wanted, there = (run.manifest(each) for each in ("policy", name))
    if wanted.made_from.get("model") != there.made_from.get("model"):
        return False
    elsewhere = dict.fromkeys(("device", "track"))
    trained = [each.settings["train"] | elsewhere for each in (wanted, there)]
    return bool(trained[0] == trained[1] and wanted.settings["policy"] == there.settings["policy"])


def align(run: Run, settings: AlignSettings, *, name: str | None = None, compute: ComputeSettings = AS_USUAL) -> str:
    """The alignment stage of a run, to RUN/policy-NAME (the objective's name, if not given).

    Returns the name of the artefact. Raises: SettingsError for a name that is taken; ArtifactError where the policy
    that it starts from is stale.
    """
    settings = settings.resolved()
    stage_device(settings.device)
    folder = run.folder / f"policy-{check_aligned_name(name or settings.objective)}"
    if (reason := run.stale("policy")) is not None:
        raise ArtifactError(f"{reason}: sagerec train")
    if settings.start == "all-at-once" and not _has_all_at_once(run):
        require(
            parallel.launched() == 1,
            "several processes need the policy that they start from: sagerec train RUN --all-at-once",
        )
        supervised = run.manifest("policy")
        trained, shape = supervised.settings, settings_of(supervised.settings["policy"])
        for what, content in _inputs(run, shape).items():
            if supervised.made_from.get(what) != content:
                raise ArtifactError(
                    f"{run.folder}/policy was made from another {what} than the one that stands there today, from "
                    f"which policy-{ALL_AT_ONCE} would be made; put the {what} back, train anew (sagerec train), or "
                    "start from the policy alone: --start supervised"
                )
        how = replace(from_json(TrainSettings, trained["train"]), device=settings.device, track=())
        train_all_at_once(run, shape, how)
    start, made_from = aligned_from(run, settings)
    policy_settings = run.manifest(start).settings["policy"]
    resolved = {"policy": policy_settings, "align": settings.what(), **compute.what()}
    with making(folder, "policy", made_from=made_from, settings=resolved, seed=settings.seed) as needed:
        if needed:
            space = run.space()
            policy = read_policy(run.folder / start, space)
            # The divergence from it is logged, and may be in the loss; the control has neither.
            reference = None if settings.row.trains_on_targets else read_policy(run.folder / start, space)
            align_policy(
                folder,
                policy,
                reference,
                run.data,
                run.split,
                settings,
                store=run.store(),
                policy_settings=policy_settings,
                made_from=made_from,
                compute=compute,
            )
    return folder.name


def evaluate(run: Run, settings: EvaluateSettings, *, name: str = "policy", device: str = "auto") -> dict[str, Any]:
    """Evaluate a policy of the run; writes and returns its report, which is another for free writing: `…+free.json`.

    Raises: ArtifactError for a stale policy; SettingsError for lists longer than the catalogue.
    """
    if (reason := run.stale(name)) is not None:
        raise ArtifactError(f"stale: {reason}, then evaluate it")
    space = run.space()

    def lists() -> tuple[np.ndarray, float]:
        cases = run.split.cases(run.data, settings.split)
        policy = run.policy(name, device=device)
        with progress_bar("evaluating", len(cases)) as bar:
            found, exact = list_cases(
                policy,
                cases,
                k=max(settings.k),
                beams=settings.beams,
                widen=settings.exact,
                exclude_history=excludes_history(run.split.sequences(run.data, "train"), settings),
                greedy_slates=settings.lists == "slate",
                free=FREE.get(settings.lists, ""),
                on_batch=bar.update,
            )
        return found, float(exact.mean())

    stem = f"evaluation{name.removeprefix('policy')}{f'+{settings.lists}' if settings.lists in FREE else ''}"
    return report_lists(run, stem, settings, lists, space, run.hashes(name, run.actions), of_ids=True)


def report_lists(
    run: Run,
    stem: str,
    settings: EvaluateSettings,
    lists: Callable[[], tuple[np.ndarray, float]],
    space: ActionSpace,
    made_from: dict[str, str],
    *,
    of_ids: bool = False,
) -> dict[str, Any]:
    """The report RUN/`stem`.json where it fits, else a new one of `lists`, which gives the lists (U, K) and the share
    that is proven exact; `of_ids`: they hold sequences that several items may share.
    """
    require(
        max(settings.k) <= max(run.data.n_items, *EvaluateSettings().k),
        f"k is {max(settings.k)}; expected at most {run.data.n_items:,}, the items of the catalogue",
    )
    stem = stem if settings.split == "test" else f"{stem}-{settings.split}"
    path = run.folder / f"{stem}.json"
    with locked(path):
        if path.is_file():
            try:
                saved = run.report(stem)
            except ArtifactError as error:
                logger.info("%s", error)
            else:
                if saved["made_from"] == made_from and saved["settings"] == to_json(settings):
                    logger.info("%s is there and fits", path.name)
                    return saved
        cases = run.split.cases(run.data, settings.split)
        found, exact = lists()
        shared = of_ids and not space.is_unique
        report = evaluate_lists(
            found, cases, run.data, run.split, space, settings, shared_ids=shared, store=run.store()
        )
        train_events = run.split.sequences(run.data, "train")
        report |= {
            "history_excluded": settings.lists not in FREE and excludes_history(train_events, settings),
            "proven_exact": exact,
            "made_from": made_from,
            "versions": artifacts.package_versions(),
        }
        return write_evaluation(path, report, cases, found, run.data)


def read_lists(run: Run, name: str = "") -> np.ndarray:
    """The lists (n, K) of RUN/evaluation`name`, as item indices, -1 where there is none.

    Raises: ArtifactError where they are missing.
    """
    path = run.lists_path(f"evaluation{name}")
    try:
        return pl.read_parquet(path)["items"].to_numpy().astype(np.int64)
    except artifacts.UNREADABLE as error:
        raise ArtifactError(f"{path} cannot be read ({error}): evaluate again") from error


def diagnose_lists(run: Run, names: Sequence[str], k: int = 10) -> dict[str, Diagnosis]:
    """Where the saved test lists of some systems miss; a name is that of a policy, or of a baseline.

    Raises: ArtifactError where a system has no saved test lists of at least k places that fit the run of today.
    """
    cases, counts = run.split.cases(run.data, "test"), learnt_counts(run.data, run.split)
    found = {}
    for name in names:
        stem = "evaluation" if name == "policy" else f"evaluation-{check_name(name).removeprefix('policy-')}"
        report, path = run.report(stem), run.folder / f"{stem}.json"
        if report["split"] != "test" or run.outdated(report["made_from"], grown=False):
            raise ArtifactError(f"{path} measures another split or an earlier artefact; evaluate {name} again")
        lists = read_lists(run, stem.removeprefix("evaluation"))
        if lists.shape[1] < k:
            raise ArtifactError(f"the lists of {path} have {lists.shape[1]} places; expected {k} or more: lower --k")
        found[name] = diagnose(lists[:, :k], cases.targets, run.space(), counts, BUCKET_EDGES)
    return found


def audit(run: Run) -> list[Finding]:
    """Check every artefact of the run that learned from the log against its split.

    Raises: LeakError where a stage used a held-out event; ArtifactError where one does not say what it used, or its
    files were changed.
    """
    for name in ("dataset", "split"):
        artifacts.check_content(run.folder / name, run.manifest(name))
    audit_order(run.data, run.split)
    findings = []
    aligned = {name: ALIGNED_SEES for name in run.aligned()}
    spaces: dict[str, tuple[Part, ...]] = {name: ("train",) for name in KINDS}
    for name, allowed in (spaces | AUDITED | aligned).items():
        folder = run.folder / name
        if not folder.is_dir():
            continue
        artifacts.check_content(folder, run.manifest(name))
        if (reason := run.stale(name)) is not None:
            logger.warning("audit: stale: %s", reason)
            findings.append(Finding(name, {}, allowed, stale=True))  # its rows are those of another log or split
            continue
        findings.append(audit_stage(name, read_events_used(folder), run.data, run.split, allowed=allowed))
    checked = sum(not finding.stale for finding in findings)
    logger.info("audit: %d stages saw no event that they must not see (%s)", checked, EVENTS_USED)
    return findings


def run_all(dataset: Path, out: Path, settings: RunSettings, *, with_refit: bool = False) -> list[dict[str, Any]]:
    """All stages of a run; returns the reports, the policy's first."""
    run = prepare(dataset, out, settings.split)
    make_actions(run, settings.space)
    train(run, settings.policy, settings.train)
    if with_refit:
        refit(run, settings.policy, settings.train)
    audit(run)
    reports = [evaluate(run, settings.evaluate, device=settings.train.device)]
    if with_refit:
        reports.append(evaluate(run, settings.evaluate, name="policy-refit", device=settings.train.device))
    return reports


@contextmanager
def making(
    folder: Path,
    kind: str,
    *,
    made_from: dict[str, str],
    settings: dict[str, Any],
    seed: int | None = None,
    grown_from: dict[str, list[str]] | None = None,
) -> Iterator[bool]:
    """Hold the place of a stage's artefact, and tell whether the stage must run; the log says why.

    `grown_from`: inputs that may have had items added since. Of several ranks the first holds it, and tells the others.
    """
    if parallel.rank():
        yield parallel.share_from_first(True)
        return
    with locked(folder):
        reason = None
        if not folder.exists():
            logger.info("%s: making it", folder.name)
        else:
            reason = artifacts.misfit(
                folder, kind, made_from=made_from, settings=settings, seed=seed, grown_from=grown_from
            )
            said = "there and fits" if reason is None else f"making it again, for {reason}"
            logger.info("%s: %s", folder.name, said)
            if reason is None:
                discard_finished(folder, artifacts.read_manifest(folder, kind))
        yield parallel.share_from_first(reason is not None or not folder.exists())
