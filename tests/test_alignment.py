"""The alignment stage on planted data: rewards rise, a spoilt policy recovers, runs resume, ranks agree."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.artifacts import read_manifest, write_artifact
from sagerec.catalogue.dataset import read_dataset, write_dataset
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.catalogue.splits import SplitSettings
from sagerec.decoding.cases import list_cases
from sagerec.errors import ArtifactError, RewardError, SettingsError, TrainingError
from sagerec.evaluation.metrics import first_rank, recall_at
from sagerec.objectives.loss import policy_loss
from sagerec.objectives.rewards import parse_rewards
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import align, audit, make_actions, prepare, train
from sagerec.training import rounds
from sagerec.training.batches import Windows, make_windows
from sagerec.training.feedback import gather_facts, gather_feedback
from sagerec.training.loop import make_optimizer
from sagerec.training.settings import AlignSettings, TrainSettings, parse_criterion
from tests.conftest import ENVIRONMENT, SMALL_IDS, SMALL_POLICY, SMALL_TRAIN

QUICK = AlignSettings(
    start="supervised",
    slates=8,
    batch_users=32,
    round_users=64,
    epochs=2,
    learning_rate=2e-3,
    policy_weight=1.0,
    sft_weight=0.7,
    replay_weight=0.0,
    validations=2,
    checkpoint_every=1,
    device="cpu",
)


@pytest.fixture(scope="module")
def base_run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the small store with one event a user reserved, and a supervised policy; tests copy it."""
    out = tmp_path_factory.mktemp("align") / "run"
    run = prepare(store_folder, out, SplitSettings(reserve="event"))
    make_actions(run, SMALL_IDS)
    train(run, SMALL_POLICY, SMALL_TRAIN)
    return out


@pytest.fixture
def run(base_run: Path, tmp_path: Path) -> Run:
    shutil.copytree(base_run, tmp_path / "run")
    return open_run(tmp_path / "run")


def metrics_of(run: Run, name: str) -> list[dict[str, Any]]:
    lines = (run.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("reward", "more"),
    [
        ("click", {}),
        ("like", {}),
        ("watch", {"objective": "gbpo"}),
        ("novelty", {"objective": "grpo"}),
        ("similarity", {"objective": "gspo"}),
        ("collaborative", {"objective": "cispo"}),
        ("category", {"objective": "dr_grpo"}),
        ("cold", {"objective": "ecpo"}),
        ("diversity", {"objective": "sage", "k": 4, "epochs": 20}),
        ("click", {"objective": "sage", "k": 3, "credit": "item"}),
    ],
)
def test_alignment_raises_the_reward_that_it_is_given(run: Run, reward: str, more: dict[str, Any]) -> None:
    """Sampled slates earn clearly more in the last rounds than in the first."""
    common: dict[str, Any] = {"beam_slates": 0, "sft_weight": 0.0, "validations": 0, "epochs": 10}
    settings = replace(QUICK, reward=(f"{reward}=1",), **(common | more))
    name = align(run, settings)
    earned = [line[f"reward/{reward}"] for line in metrics_of(run, name)]
    first, last = np.mean(earned[:2]), np.mean(earned[-3:])
    # Of the diversity that there can be, 1, a young policy has nine tenths.
    assert last > (1.01 if reward == "diversity" else 1.1) * first, (first, last)


def test_dislikes_of_negative_weight_fall(run: Run) -> None:
    settings = replace(QUICK, reward=("dislike=-1",), beam_slates=0, sft_weight=0.0, validations=0, epochs=12)
    earned = [line["reward/dislike"] for line in metrics_of(run, align(run, settings))]
    assert np.mean(earned[-3:]) < 0.9 * np.mean(earned[:2])


def test_hits_alone_recover_a_policy_that_was_spoilt(tmp_path: Path) -> None:
    """A policy that knows each item's successor is spoilt by noise in its weights; rewarded hits bring recall back."""
    write_store(tmp_path / "store", simulate(StoreSettings(users=300, items=200, dynamics="successor", seed=1)))
    run = prepare(tmp_path / "store", tmp_path / "run", SplitSettings(reserve="event"))
    make_actions(run, SemanticIdSettings(levels=2, codebook_size=32))
    train(
        run,
        LazyDecoderSettings(width=32, heads=2, encoder_layers=1, dropout=0.0),
        TrainSettings(epochs=16, batch_size=16, validate_every=16, weight_decay=0.0, device="cpu"),
    )
    path = run.folder / "policy" / "model.safetensors"
    weights, generator = load_file(path), torch.Generator().manual_seed(0)
    matrices = {n: w for n, w in weights.items() if w.ndim > 1}
    spoilt = {n: w + 0.5 * w.std() * torch.randn(w.shape, generator=generator) for n, w in matrices.items()}
    manifest = run.manifest("policy")
    with write_artifact(
        path.parent, "policy", made_from=manifest.made_from, settings=manifest.settings, sizes=manifest.sizes
    ) as fresh:
        shutil.copytree(path.parent, fresh, dirs_exist_ok=True)
        save_file(weights | spoilt, fresh / path.name)
    before = recall_at_1(run, "policy")
    settings = replace(QUICK, reward=("hit=1",), sft_weight=0.0, slates=16, epochs=6, criterion=("recall=1",))
    after = recall_at_1(run, align(run, settings))
    assert before < 0.7
    assert after > before + 0.2


def recall_at_1(run: Run, name: str) -> float:
    cases = run.split.cases(run.data, "test")
    lists, _ = list_cases(run.policy(name, device="cpu"), cases, k=1)
    return float(recall_at(first_rank(lists, cases.targets), 1).mean())


def test_the_control_trains_on_the_same_events_and_the_audit_proves_them(run: Run) -> None:
    names = [align(run, QUICK.for_objective(objective)) for objective in ("sft", "sage")]
    assert names == run.aligned()[::-1] == ["policy-sft", "policy-sage"]
    found = {finding.stage: finding.counts for finding in audit(run)}
    reserved = run.split.counts()["align"]
    assert found["policy"]["align"] == 0
    for name in names:
        assert found[name]["align"] == reserved
        assert found[name]["valid"] == found[name]["test"] == 0
    one, two = (read_manifest(run.folder / name, "policy").sizes for name in names)
    assert one["updates"] == two["updates"]
    assert one["contexts"] == two["contexts"] == reserved
    sft = [line["sft_loss_nats"] for line in metrics_of(run, "policy-sft") if "sft_loss_nats" in line]
    assert sft[-1] < sft[0]
    assert "reward/hit" not in metrics_of(run, "policy-sft")[1]


def test_fewer_events_can_be_used(run: Run) -> None:
    align(run, replace(QUICK, max_contexts=40, epochs=1, validations=0), name="few")
    sizes = read_manifest(run.folder / "policy-few", "policy").sizes
    assert sizes["contexts"] == 40
    assert sizes["updates"] == 2
    found = next(finding for finding in audit(run) if finding.stage == "policy-few")
    assert found.counts["align"] == 40


def test_a_reward_that_cannot_vary_is_named(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Of a policy that writes items alone every slate is valid."""
    with caplog.at_level(logging.WARNING):
        align(run, replace(QUICK, reward=("validity=1", "hit=1"), max_contexts=20, epochs=1, validations=0))
    assert "the reward validity is 1 for every slate" in caplog.text


def test_the_record_says_what_happened(run: Run) -> None:
    align(run, replace(QUICK, passes=2, kl_weight=0.1, entropy_weight=0.01))
    lines = metrics_of(run, "policy-sage")
    assert lines[0]["round"] == 0
    kept = read_manifest(run.folder / "policy-sage", "policy").sizes["kept_round"]
    validated = {line["round"]: line["criterion"] for line in lines if "criterion" in line}
    assert max(validated, key=lambda number: validated[number]) == kept
    last = lines[-1]
    for name in (
        "gradient_norm",
        "ratio_q05",
        "ratio_q95",
        "share_at_upper",
        "share_at_lower",
        "coefficient_positive",
        "advantage_std",
        "kl_nats",
        "entropy_nats",
        "reward/hit",
        "diversity_q50",
        "valid_recall@10",
        "valid_cold_recall@10",
        "valid_entropy@10",
    ):
        assert name in last, name
    assert last["invalid_rate"] == last["duplicate_rate"] == 0
    assert last["kl_nats"] > 0
    # Rollouts of two passes over two minibatches: the ratio leaves 1.
    assert last["ratio_q05"] < 1 < last["ratio_q95"]
    assert lines[1]["kl_nats"] == pytest.approx(0, abs=1e-6)
    names = Path(__file__).parents[1] / "docs" / "metrics.md"
    documented = names.read_text(encoding="utf-8")
    for name in last:
        assert f"`{name.partition('/')[0]}" in documented, f"{name} is not in docs/metrics.md"


ALIGN_SCRIPT = """
import sys
from dataclasses import replace
import torch
from sagerec.run.folder import open_run
from sagerec.run.stages import align
from tests.test_alignment import QUICK
torch.set_num_threads(1)
align(open_run(sys.argv[1]), replace(QUICK, **eval(sys.argv[2], {})))
"""


def same_weights(one: Path, two: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_an_alignment_killed_at_any_moment_resumes_to_the_same_weights(base_run: Path, tmp_path: Path) -> None:
    """SIGKILL at three moments, then to the end: weights and metrics equal those of an uninterrupted run."""
    for name in ("whole", "killed"):
        shutil.copytree(base_run, tmp_path / name)
    arguments = "dict(epochs=4, beam_slates=4, replay_weight=0.5)"

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", ALIGN_SCRIPT, str(tmp_path / name), arguments]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    work = tmp_path / "killed" / "policy-sage.training"
    for rounds_done, delay in ((1, 0.0), (3, 0.05), (6, 0.02)):
        process = start("killed")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            path = work / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) > rounds_done:
                break
            time.sleep(0.005)
        time.sleep(delay)
        assert process.poll() is None, "the alignment ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    assert same_weights(tmp_path / "whole" / "policy-sage", tmp_path / "killed" / "policy-sage")
    records = []
    for name in ("whole", "killed"):
        lines = (tmp_path / name / "policy-sage" / "metrics.jsonl").read_text().splitlines()
        records.append([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines])
    assert records[0] == records[1]
    assert not work.exists()


def test_replay_keeps_what_supervised_training_knew(base_run: Path, tmp_path: Path) -> None:
    """The control at a high rate forgets the training sequences; with replay it fits them better, and says so."""
    shutil.copytree(base_run, tmp_path / "run")
    run = open_run(tmp_path / "run")
    windows = make_windows(run.split.sequences(run.data, "train"), SMALL_POLICY.resolved().max_items)
    batch = [torch.from_numpy(x) for x in windows.batch(np.arange(len(windows)))]
    losses = {}
    for weight in (0.0, 1.0):
        name = align(
            run, replace(QUICK.for_objective("sft"), replay_weight=weight, validations=0), name=f"w{weight:.0f}"
        )
        with torch.no_grad():
            losses[weight] = float(run.policy(name, device="cpu").next_item_loss(*batch))
        last = json.loads((run.folder / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert ("replay_loss_nats" in last) == (weight > 0)
    assert losses[1.0] < losses[0.0] - 0.05
    counts = {finding.stage: finding.counts for finding in audit(run)}
    assert counts["policy-w1"] == run.split.counts() | {"valid": 0, "test": 0}


def test_replay_goes_through_all_sequences_once_an_epoch(base_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(base_run)
    windows = make_windows(run.split.sequences(run.data, "train"), SMALL_POLICY.resolved().max_items)
    policy, settings, seen = run.policy(device="cpu"), replace(QUICK, replay_weight=1.0), []
    batch = Windows.batch

    def watched(self: Windows, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen.append(index)
        return batch(self, index)

    monkeypatch.setattr(Windows, "batch", watched)
    steps = -(-len(windows) // settings.batch_users)
    with torch.no_grad():
        for step in range(2 * steps):
            rounds.replay_loss(policy, windows, step, settings)
    first, second = np.concatenate(seen[:steps]), np.concatenate(seen[steps:])
    assert sorted(first) == sorted(second) == list(range(len(windows)))
    assert not np.array_equal(first, second)


def test_two_ranks_make_the_updates_of_one(base_run: Path, tmp_path: Path) -> None:
    """Torchrun with gloo: sampled and beam slates, three rewards; dropout off, for its masks hang on the shapes."""
    script = tmp_path / "align.py"
    script.write_text(ALIGN_SCRIPT)
    arguments = "dict(epochs=1, beam_slates=4, sft_weight=0.0, validations=0, batch_users=30, round_users=60)"
    weights = []
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        shutil.copytree(base_run, tmp_path / name)
        command = [*launcher, str(script), str(tmp_path / name), arguments]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(tmp_path / name / "policy-sage" / "model.safetensors"))
    start = load_file(base_run / "policy" / "model.safetensors")
    moved = sum(float((weights[0][n] - start[n]).square().sum()) for n in start) ** 0.5
    apart = sum(float((weights[0][n] - weights[1][n]).square().sum()) for n in start) ** 0.5
    assert moved > 0.1
    assert apart < 1e-3 * moved, (apart, moved)  # AdamW's first steps magnify the rounding of near-zero gradients
    one, two = (metrics_of(open_run(tmp_path / name), "policy-sage") for name in ("one", "two"))
    assert [line.get("reward/hit") for line in one] == pytest.approx([line.get("reward/hit") for line in two])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run: Run) -> None:
    settings = replace(QUICK, epochs=1, beam_slates=0, validations=0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        state = torch.get_rng_state()
        align(run, replace(settings, seed=seed), name=name)
        assert torch.equal(state, torch.get_rng_state()), "alignment must leave the caller's random state alone"
    assert same_weights(run.folder / "policy-a", run.folder / "policy-b")
    assert not same_weights(run.folder / "policy-a", run.folder / "policy-c")


def test_rollouts_of_another_seed_hold_other_slates(run: Run) -> None:
    """The beam's eight are the same, for the policy is, and the eight that are sampled are not."""
    cases = run.split.cases(run.data, "align")
    found = []
    for seed in (0, 0, 1):
        stage = stage_of(
            run, AlignSettings(reward=("hit=1",), slates=16, beam_slates=8, device="cpu", seed=seed).resolved()
        )
        made, _ = rounds.roll_round(stage, [np.arange(len(cases))], 0)
        found.append(made[0].rollouts.slates[:, :, 0])  # type: ignore[union-attr]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][:, 8:], found[2][:, 8:])
    assert bool((found[0][:, :8] != found[2][:, :8]).float().mean() > 0.5)


def test_item_credit_reaches_the_items_own_codes_alone(run: Run) -> None:
    """With hits alone rewarded, a place where no slate has the hit gets one advantage for all its items."""
    cases = run.split.cases(run.data, "align")
    for credit in ("item", "slate"):
        settings = replace(QUICK, k=3, credit=credit, reward=("hit=1",)).resolved()
        stage = stage_of(run, settings)
        made, _ = rounds.roll_round(stage, [np.arange(len(cases))], 0)
        advantages, slates = made[0].advantages, made[0].rollouts.slates  # type: ignore[union-attr]
        assert advantages is not None
        if credit == "slate":
            assert advantages.shape == slates.shape[:2]
            continue
        by_place = advantages.view(len(cases), 3, -1).transpose(1, 2)  # (B, G, K)
        hits = slates == made[0].contexts.targets[:, None, None]
        quiet = ~hits.any(dim=1, keepdim=True).expand_as(hits)
        values = by_place[quiet]
        assert bool(hits.any())
        assert float(values.std()) == pytest.approx(0, abs=1e-6)
        assert float(by_place[hits].min()) > float(values.max())


def stage_of(run: Run, settings: AlignSettings) -> rounds.Stage:
    """A stage as `align_policy` makes it."""
    policy, cases = run.policy(device="cpu"), run.split.cases(run.data, "align")
    facts = gather_facts(run.data, run.split, run.space(), clusters="coarse", cold_max_count=5)
    weights = parse_rewards(settings.reward) if settings.reward else {}
    return rounds.Stage(
        settings=settings,
        policy=policy,
        reference=run.policy(device="cpu"),
        optimizer=make_optimizer(policy, 1e-3, 0.0),
        cases=cases,
        exclude_history=True,
        rewards=weights,
        facts=facts,
        feedback=gather_feedback(run.data, run.split, cases, run.store(), list(weights), facts),
        work=run.folder,
    )


def test_a_non_finite_gradient_stops_with_the_batch_saved(run: Run) -> None:
    stage = stage_of(run, replace(QUICK, reward=("hit=1", "click=1")).resolved())
    minibatches, _ = rounds.roll_round(stage, [np.arange(8)], 0)
    with torch.no_grad():
        stage.policy.get_parameter("item_codes.weight").fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"update 3: the loss of sage is nan.*the batch is saved in .*bad-batch-3"):
        rounds.update(stage, minibatches[0], 3, 10)
    stage = stage_of(run, replace(QUICK, reward=("hit=1",), sft_weight=1.0).resolved())
    minibatches, _ = rounds.roll_round(stage, [np.arange(8)], 0)
    bias = stage.policy.get_parameter("content_map.bias")
    bias.register_hook(lambda gradient: gradient * torch.nan)  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match=r"gradient norm nan at update 3; the batch is saved in .*bad-batch-3"):
        rounds.update(stage, minibatches[0], 3, 10)
    saved = load_file(run.folder / "bad-batch-3-rank0.safetensors")
    assert saved["slates"].shape == (8, 8, 1)
    assert saved["advantages"].shape == (8, 8)


def test_what_cannot_be_aligned_is_refused(run: Run, small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"reserves no event for alignment.*--split.reserve event"):
        align(open_run(small_run.folder), QUICK, name="refused")
    assert not (small_run.folder / "policy-refused.training").exists()
    with pytest.raises(RewardError, match="the simulated store answers click, like, dislike, watch, not 'follow'"):
        align(run, replace(QUICK, reward=("follow=1",)))
    with pytest.raises(SettingsError, match="unknown objective 'ppo'"):
        AlignSettings(objective="ppo")
    with pytest.raises(SettingsError, match="criterion 'speed=1'; expected METRIC=WEIGHT"):
        AlignSettings(criterion=("speed=1",))
    unread: list[tuple[dict[str, Any], str]] = [
        ({"objective": "grpo", "boost": 4.0}, "--boost is not read by objective grpo; leave it out"),
        ({"objective": "sage", "cap": 2.0}, "--cap is not read by objective sage; leave it out"),
        ({"top_p": 0.9, "beam_slates": 32}, "all slates come from beam search"),
        ({"slates": 1}, "slates is 1, and sage compares the slates of a context"),
    ]
    for settings, message in unread:
        with pytest.raises(SettingsError, match=message):
            AlignSettings(**settings)
    with pytest.raises(SettingsError, match="credit 'item' with one item a slate"):
        AlignSettings(credit="item")
    with pytest.raises(ArtifactError, match="policy-nope"):
        run.policy("policy-nope")
    assert parse_criterion(("recall=1", "entropy=0.5")) == {"recall": 1.0, "entropy": 0.5}


def test_logged_feedback_is_keyed_by_event_and_missing_columns_are_named(tmp_path: Path) -> None:
    """A log without a store: the target earns what its own event says; like is a column, dislike is not."""
    store = simulate(StoreSettings(users=150, items=200, seed=3))
    events = store.interactions.drop("dislike") if "dislike" in store.interactions.columns else store.interactions
    items = store.items.drop("categories")
    write_dataset(tmp_path / "data", items, events)
    run = prepare(tmp_path / "data", tmp_path / "run", SplitSettings(reserve="event"))
    make_actions(run, SMALL_IDS)
    train(run, SMALL_POLICY, SMALL_TRAIN)
    stage = stage_of(run, replace(QUICK, reward=("like=1",)).resolved())
    index = np.arange(40)
    contexts = rounds.read_cases(stage, index)
    slates = contexts.targets[:, None, None].expand(-1, 2, 1).clone()
    slates[:, 1] = (slates[:, 1] + 1) % run.data.n_items
    answers = stage.feedback.answers(
        index, contexts.items.numpy(), contexts.lengths.numpy(), slates=slates, targets=contexts.targets
    )["like"]
    logged = read_dataset(tmp_path / "data").events["like"].cast(float).to_numpy()[stage.cases.rows[index]]
    assert answers[:, 0, 0].tolist() == logged.tolist()
    assert not bool(answers[:, 1].any())
    assert 0 < logged.sum() < 40
    with pytest.raises(RewardError, match="the reward 'dislike' needs the column 'dislike'"):
        align(run, replace(QUICK, reward=("dislike=-1",)))
    # What a user watches later tells nothing of the reserved event: held-out rows changed, the reward stays.
    watched = []
    for factor in (0.01, 100.0):
        part = pl.Series(run.split.mask("valid", "test"))
        later = events.with_columns(
            watch_seconds=pl.when(part).then(pl.col("watch_seconds") * factor).otherwise(pl.col("watch_seconds"))
        )
        write_dataset(tmp_path / f"data{factor}", items, later)
        other = prepare(tmp_path / f"data{factor}", tmp_path / f"run{factor}", SplitSettings(reserve="event"))
        cases = other.split.cases(other.data, "align")
        facts = gather_facts(other.data, other.split, run.space(), clusters="coarse", cold_max_count=5)
        found = gather_feedback(other.data, other.split, cases, None, ["watch"], facts).logged["watch"]
        watched.append(found.tolist())
    assert watched[0] == watched[1]
    assert 0 < sum(value == 1 for value in watched[0]) < len(watched[0])
    with pytest.raises(RewardError, match="the reward 'category' needs categories, and no item has one"):
        align(run, replace(QUICK, reward=("category=1",)))


def test_figures_of_token_ratios_are_of_counted_tokens() -> None:
    """Ratios 2 of the two counted tokens, one of them at the bound of a clip; what stands elsewhere counts nowhere."""
    old = torch.full((1, 2, 3), -2.0)
    mask = torch.tensor([[[True, False, False], [True, False, False]]])
    found = policy_loss(
        "grpo",
        logprobs=(old + torch.tensor(2.0).log()).masked_fill(~mask, -7.0).requires_grad_(),
        old_logprobs=old,
        mask=mask,
        rewards=torch.tensor([[[1.0], [0.0]]]),
    )
    figures = rounds.bound_figures(found, mask)
    assert [figures[f"ratio_q{q}"].item() for q in ("05", "50", "95")] == pytest.approx([2.0] * 3)
    assert (figures["share_at_upper"].item(), figures["share_at_lower"].item()) == (0.5, 0.0)
    assert (figures["coefficient_positive"].item(), figures["coefficient_negative"].item()) == pytest.approx((0, 2))


def test_nobody_answers_to_a_place_without_an_item(run: Run) -> None:
    """The store's answers and item-kNN's scores: 0 at -1, elsewhere what they are without it."""
    stage = stage_of(run, replace(QUICK, reward=("collaborative=1", "click=1", "watch=1")).resolved())
    index = np.arange(5)
    contexts = rounds.read_cases(stage, index)
    slates = torch.arange(30).view(5, 2, 3)
    holed = slates.clone()
    holed[:, 1, 1:] = -1
    history = (index, contexts.items.numpy(), contexts.lengths.numpy())
    whole, found = (stage.feedback.answers(*history, slates=s, targets=contexts.targets) for s in (slates, holed))
    assert {"collaborative", "click", "watch"} <= found.keys()
    for name, values in found.items():
        assert not bool(values[holed < 0].any()), name
        assert torch.equal(values[holed >= 0], whole[name][holed >= 0]), name
