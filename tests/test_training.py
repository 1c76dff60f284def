"""Training: windows and batches by hand, planted data, and a killed run that resumes bit for bit."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.artifacts import read_manifest
from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.catalogue.splits import Sequences, SplitSettings, make_split
from sagerec.errors import ArtifactError, MissingExtraError, SettingsError, TrainingError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.policies.registry import read_policy
from sagerec.run.folder import Run
from sagerec.run.stages import RunSettings, evaluate, make_actions, prepare, train
from sagerec.training.batches import Windows, device_batch, make_windows, shuffled_batches
from sagerec.training.checkpoints import newest_checkpoint, save_checkpoint
from sagerec.training.loop import fit, learning_rate_at
from sagerec.training.settings import TrainSettings
from sagerec.training.tracking import JsonLines, TrackerName, open_trackers
from tests.conftest import ENVIRONMENT, SMALL_IDS, SMALL_POLICY, SMALL_TRAIN
from tests.test_policy import all_logprobs, small_policy


def sequences(lengths: list[int]) -> Sequences:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n = int(offsets[-1])
    return Sequences(np.arange(n, dtype=np.int32), offsets, np.arange(len(lengths), dtype=np.int32), np.arange(n))


def test_windows_by_hand() -> None:
    """Lengths 4, 1, 6 at most 2 inputs: the first gives 2 + 1, the second none, the third 2 + 2 + 1.

    Sequence 0 holds items 0-3: inputs 1,2 -> targets 2,3 and input 0 -> target 1. Sequence 2 holds 5-10: inputs
    8,9; 6,7; 5.
    """
    windows = make_windows(sequences([4, 1, 6]), 2)
    assert windows.begins.tolist() == [1, 0, 8, 6, 5]
    assert windows.lengths.tolist() == [2, 1, 2, 2, 1]
    inputs, targets, counted = windows.batch(np.array([0, 1]))
    assert inputs.tolist() == [[1, 2], [0, 0]]
    assert targets.tolist() == [[2, 3], [1, 0]]
    assert counted.tolist() == [[True, True], [True, False]]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), longest=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_every_item_but_a_sequences_first_is_a_target_once(lengths: list[int], longest: int) -> None:
    data = sequences(lengths)
    if max(lengths) == 1:
        with pytest.raises(TrainingError, match="has two items"):
            make_windows(data, longest)
        return
    windows = make_windows(data, longest)
    seen: list[int] = []
    for index in shuffled_batches(windows.lengths, 3, np.random.default_rng(0)):
        inputs, targets, counted = windows.batch(index)
        assert (targets[counted] == inputs[counted] + 1).all()
        seen += targets[counted].tolist()
    firsts = set(data.offsets[:-1].tolist())
    assert sorted(seen) == [i for i in range(len(data.items)) if i not in firsts]
    assert windows.n_targets == len(seen)


def test_batches_are_of_like_length_and_change_with_the_generator() -> None:
    lengths = np.array([1, 9, 1, 9, 1, 9, 1, 9])
    first = shuffled_batches(lengths, 4, np.random.default_rng(0))
    assert sorted(tuple(lengths[b].tolist()) for b in first) == [(1, 1, 1, 1), (9, 9, 9, 9)]
    others = [shuffled_batches(lengths, 4, np.random.default_rng(seed)) for seed in range(1, 5)]
    assert any(first[0].tolist() != other[0].tolist() for other in others)


def test_learning_rate_by_hand() -> None:
    """100 steps, 10 % warm-up to 1: step 0 gives 1/10, step 9 gives 1, step 55 is half-way down, the last near 1/50."""
    assert learning_rate_at(0, 100, 1.0, 0.1) == pytest.approx(0.1)
    assert learning_rate_at(9, 100, 1.0, 0.1) == pytest.approx(1.0)
    assert learning_rate_at(55, 100, 1.0, 0.1) == pytest.approx(0.02 + 0.98 / 2)
    assert learning_rate_at(100, 100, 1.0, 0.1) == pytest.approx(0.02)
    assert {learning_rate_at(step, 100, 0.5, 0.0, final_share=1.0) for step in range(100)} == {0.5}


@pytest.mark.parametrize("like_lengths", [True, False])
def test_batches_of_like_length_are_a_setting(like_lengths: bool, tmp_path: Path) -> None:
    """Eight sequences of one input and eight of nine, four a batch: alike in every batch, or in some batch not."""
    model, seen = torch.nn.Linear(1, 1), list[set[int]]()

    def loss(inputs: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        if model.training:  # what is kept is tried once more at the end
            seen.append(set(counted.sum(1).tolist()))
        return model.weight.sum()

    settings_ = TrainSettings(epochs=1, batch_size=4, like_lengths=like_lengths, device="cpu")
    fit(model, tmp_path, make_windows(sequences([2, 10] * 8), 9), settings_, loss=loss, validate=None, fingerprint=[])
    assert all(len(lengths) == 1 for lengths in seen) == like_lengths


def test_loss_is_the_mean_of_the_brute_force_logprobs() -> None:
    policy = small_policy()
    inputs, targets = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[2, 3, 4], [5, 6, 0]])
    counted = torch.tensor([[True, True, True], [True, True, False]])
    with torch.no_grad():
        states, _ = policy.encode_all(inputs)
        expected = [
            -float(all_logprobs(policy, states[b, t][None])[0, targets[b, t]]) for b, t in counted.nonzero().tolist()
        ]
        loss = float(policy.next_item_loss(inputs, targets, counted))
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_planted_successors_are_learnt_to_recall_one(tmp_path: Path) -> None:
    """Where the next item is a function of the last, recall@1 reaches 1 on validation and test."""
    write_store(tmp_path / "store", simulate(StoreSettings(users=300, items=200, dynamics="successor", seed=1)))
    run = prepare(tmp_path / "store", tmp_path / "run", SplitSettings())
    make_actions(run, SemanticIdSettings(levels=2, codebook_size=32))
    settings_ = TrainSettings(epochs=16, batch_size=16, validate_every=16, weight_decay=0.0, device="cpu")
    train(run, LazyDecoderSettings(width=32, heads=2, encoder_layers=1, dropout=0.0), settings_)
    for split in ("valid", "test"):
        report = evaluate(run, EvaluateSettings(split=split, k=(1, 5), history="keep"))
        assert report["metrics"]["recall@1"]["value"] == 1.0


def _prepared(store_folder: Path, out: Path) -> Run:
    run = prepare(store_folder, out, SplitSettings())
    make_actions(run, SMALL_IDS)
    return run


TRAIN_SCRIPT = """
import sys
from dataclasses import replace
import torch
from sagerec.run.folder import open_run
from sagerec.run.stages import train
from tests.conftest import ENVIRONMENT, SMALL_POLICY, SMALL_TRAIN
torch.set_num_threads(1)
train(open_run(sys.argv[1]), SMALL_POLICY, replace(SMALL_TRAIN, epochs=6))
"""


def test_a_training_killed_at_any_moment_resumes_to_the_same_weights(store_folder: Path, tmp_path: Path) -> None:
    """SIGKILL at three different moments, then once more to the end: the weights equal an uninterrupted run's."""
    whole, killed = _prepared(store_folder, tmp_path / "whole"), _prepared(store_folder, tmp_path / "killed")

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", TRAIN_SCRIPT, str(folder)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(whole.folder).wait() == 0
    work = killed.folder / "policy.training"
    for epochs_done, delay in ((1, 0.0), (2, 0.05), (4, 0.02)):
        process = start(killed.folder)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            lines = (work / "metrics.jsonl").read_text().splitlines() if (work / "metrics.jsonl").exists() else []
            if len(lines) > epochs_done:
                break
            time.sleep(0.005)
        time.sleep(delay)
        assert process.poll() is None, "the training ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed.folder / "policy").exists()
    assert start(killed.folder).wait() == 0

    expected = load_file(whole.folder / "policy" / "model.safetensors")
    resumed = load_file(killed.folder / "policy" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    losses = []
    for run in (whole, killed):
        lines = (run.folder / "policy" / "metrics.jsonl").read_text().splitlines()
        losses.append([(v["step"], v.get("loss_nats")) for v in map(json.loads, lines)])
    assert losses[0] == losses[1]
    assert not work.exists()


def test_another_seed_gives_other_weights_and_the_same_seed_the_same(store_folder: Path, tmp_path: Path) -> None:
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        run = _prepared(store_folder, tmp_path / str(number))
        state = torch.get_rng_state()
        train(run, SMALL_POLICY, replace(SMALL_TRAIN, seed=seed, epochs=1))
        assert torch.equal(state, torch.get_rng_state()), "training must leave the caller's random state alone"
        weights.append(load_file(run.folder / "policy" / "model.safetensors")["item_codes.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_finished_stage_is_skipped_and_changed_settings_make_it_again(
    store_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = _prepared(store_folder, tmp_path / "run")
    train(run, SMALL_POLICY, SMALL_TRAIN)
    first = read_manifest(run.folder / "policy", "policy")
    train(run, SMALL_POLICY, SMALL_TRAIN)
    assert "policy: there and fits" in caplog.text
    assert read_manifest(run.folder / "policy", "policy") == first
    train(run, SMALL_POLICY, replace(SMALL_TRAIN, learning_rate=1e-3))
    assert "policy: making it again, for its setting train is" in caplog.text
    make_actions(run, replace(SMALL_IDS, codebook_size=8))
    with pytest.raises(ArtifactError, match="was trained on other Semantic IDs"):
        run.policy()


def test_the_best_epoch_is_kept_and_patience_stops(tmp_path: Path) -> None:
    """Validation 0.1, 0.3, 0.2, 0.2, … with patience 2: stops after epoch 4, keeps the weights of epoch 2."""
    model = torch.nn.Linear(1, 1)
    kept: list[torch.Tensor] = []

    def validate() -> dict[str, float]:
        kept.append(model.weight.detach().clone())
        return {"valid_recall@10": [0.1, 0.3, 0.2, 0.2, 0.9, 0.9][len(kept) - 1]}

    def loss(inputs: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(inputs.float().reshape(-1, 1)).square().mean()
        return loss

    settings_ = TrainSettings(epochs=6, validate_every=1, patience=2, device="cpu")
    windows = make_windows(sequences([5, 5]), 4)
    summary = fit(model, tmp_path, windows, settings_, loss=loss, validate=validate, fingerprint=[])
    assert summary["epochs"] == 4
    assert summary["best_epoch"] == 2
    assert torch.equal(model.weight, kept[1])
    assert not torch.equal(kept[1], kept[3])


def test_a_non_finite_loss_stops_with_the_batch_saved(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    settings_ = TrainSettings(epochs=1, device="cpu")
    windows = make_windows(sequences([3]), 4)
    with pytest.raises(TrainingError, match=r"loss nan with gradient norm nan at step 0; the batch is saved in .*"):
        fit(
            model,
            tmp_path,
            windows,
            settings_,
            loss=lambda inputs, targets, counted: model.weight.sum() * torch.nan,
            validate=None,
            fingerprint=[],
        )
    saved = load_file(tmp_path / "bad-batch-0.safetensors")
    assert saved["inputs"].tolist() == [[0, 1]]
    assert saved["targets"].tolist() == [[1, 2]]


def test_metrics_after_the_checkpoint_are_dropped_on_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    lines = JsonLines(path, resume_step=1)
    lines.log(2, {"a": 5})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "a": 1}, {"step": 2, "a": 5}]


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "tensorboard",
            "torch.utils.tensorboard",
            r"TensorBoard is not .*pip install 'sagerec\[tensorboard\]'",
        ),
        ("mlflow", "mlflow.tracking", r"MLflow is not installed.*pip install 'sagerec\[mlflow\]'"),
        ("wandb", "wandb", r"Weights & Biases is not installed.*pip install 'sagerec\[wandb\]'"),
    ],
)
def test_a_missing_tracker_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=message):
        open_trackers(tmp_path, track=(name,), resume_step=-1)


def test_trackers_get_the_numbers_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes of the three packages: what is logged reaches each, under a name that it takes; a resumed run goes on."""
    calls: list[tuple[Any, ...]] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return f"experiment of {name}"

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("mlflow run", experiment, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

        def log_batch(self, run: str, metrics: list[tuple[Any, ...]]) -> None:
            calls.append(("mlflow", run, *((name, value, step) for name, value, _, step in metrics)))

        def set_terminated(self, run: str) -> None:
            calls.append(("mlflow end", run))

    class Run:
        id = "w1"

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("wandb", values, step))

        def finish(self) -> None:
            calls.append(("wandb end",))

    def init(**given: Any) -> Run:
        calls.append(("wandb run", given["name"], given["id"]))
        return Run()

    fakes = {
        "mlflow": SimpleNamespace(),
        "mlflow.tracking": SimpleNamespace(MlflowClient=Client),
        "mlflow.entities": SimpleNamespace(Metric=lambda *values: values),
        "wandb": SimpleNamespace(init=init),
    }
    for module, fake in fakes.items():
        monkeypatch.setitem(sys.modules, module, fake)
    work = tmp_path / "run" / "policy.training"
    for resume_step in (-1, 3):
        trackers = open_trackers(work, track=("mlflow", "wandb"), resume_step=resume_step)
        trackers.log(resume_step + 4, {"valid_recall@10": 0.5, "note": "text"})
        trackers.close()
    assert calls == [
        ("mlflow run", "experiment of sagerec", "run/policy"),
        ("wandb run", "run/policy", None),
        ("mlflow", "m1", ("valid_recall_at_10", 0.5, 3)),
        ("wandb", {"valid_recall@10": 0.5}, 3),
        ("mlflow end", "m1"),
        ("wandb end",),
        ("wandb run", "run/policy", "w1"),
        ("mlflow", "m1", ("valid_recall_at_10", 0.5, 7)),
        ("wandb", {"valid_recall@10": 0.5}, 7),
        ("mlflow end", "m1"),
        ("wandb end",),
    ]
    assert len((work / "metrics.jsonl").read_text().splitlines()) == 2


def test_mlflow_itself_keeps_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed")
    store = f"file://{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trackers = open_trackers(tmp_path / "policy.training", track=("mlflow",), resume_step=-1)
    for step, value in ((1, 0.1), (2, 0.2)):
        trackers.log(step, {"reward/cold*hit": value})
    trackers.close()
    client = tracking.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("sagerec").experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward/cold_x_hit")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2)]
    assert run.info.status == "FINISHED"


def test_wandb_itself_keeps_the_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    trackers = open_trackers(tmp_path / "policy.training", track=("wandb",), resume_step=-1)
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert not (tmp_path / "policy.training" / "wandb").exists()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="learning_rate is 0; expected above 0"):
        TrainSettings(learning_rate=0)
    with pytest.raises(SettingsError, match="precision is 'half'; expected one of auto, float32, bfloat16"):
        TrainSettings(precision="half")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="track holds 'comet'; expected some of tensorboard, mlflow, wandb"):
        TrainSettings(track=("comet",))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="epochs is 0"):
        RunSettings(train=TrainSettings(epochs=0))


def test_weights_of_a_damaged_file_are_refused(small_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    for path in (small_run.folder / "policy").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises((ArtifactError,), match=r"model\.safetensors was changed after it was written"):
        read_policy(folder, small_run.space())


def test_training_lowers_the_loss(small_run: Run, store_data: Dataset) -> None:
    lines = (small_run.folder / "policy" / "metrics.jsonl").read_text().splitlines()
    losses = [v["loss_nats"] for v in map(json.loads, lines) if "loss_nats" in v]
    assert losses[-1] < losses[0] < np.log(store_data.n_items) + 1
    assert make_split(read_dataset(small_run.folder / "dataset"), SplitSettings()).scheme == "leave-one-out"


@pytest.mark.parametrize("line", ["3", "[]", "{}", '{"step": "a"}', '{"step": null}', "\udcff", '{"step": 4', ""])
def test_a_damaged_line_of_metrics_is_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"step": 9}}\n'.encode("utf-8", "surrogateescape"))
    JsonLines(path, resume_step=5).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_checkpoint_is_gone_on_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    (tmp_path / "checkpoint-000000009").write_text("no folder")
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 3, model, optimizer, progress={"a": 1}, best={})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000003"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-000000003"
    state = tmp_path / "checkpoint-000000003" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    assert newest_checkpoint(tmp_path) is None
    assert "state.safetensors was changed after it was written" in caplog.text


def test_on_a_gpu_lengths_are_rounded_up() -> None:
    """Three inputs become eight, of which five do not count; the meta device stands for a GPU."""
    windows = Windows(np.arange(9, dtype=np.int32), np.array([0, 4]), np.array([3, 2]))
    plain = device_batch(windows, np.array([0, 1]), torch.device("cpu"))
    assert [x.shape for x in plain] == [(2, 3)] * 3
    assert [x.shape for x in device_batch(windows, np.array([0, 1]), torch.device("meta"))] == [(2, 8)] * 3
