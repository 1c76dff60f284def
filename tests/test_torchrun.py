"""Our stages on two processes (torchrun, gloo): the updates of one, other numbers of processes, a rank that is killed.

What the ranks run is in `tests/ranks.py`. Dropout is off where weights are compared, for its masks hang on the rank.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sagerec.catalogue.splits import SplitSettings
from sagerec.cli import main
from sagerec.cli.failures import explain
from sagerec.errors import SettingsError
from sagerec.policies.registry import PolicySettings
from sagerec.run.folder import open_run
from sagerec.run.stages import make_actions, prepare, train
from sagerec.training import loop, parallel
from sagerec.training.checkpoints import find_checkpoint, read_progress
from sagerec.training.settings import TrainSettings
from sagerec.training.tracking import read_metrics
from tests.conftest import ENVIRONMENT, ROOT, SMALL_IDS, SMALL_TRAIN
from tests.language_models import save_model
from tests.ranks import NO_DROPOUT, STAGES, language_settings, run_shards, run_stage

pytest.importorskip("transformers")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NAMES = {stage: "policy-sage" if stage.endswith("align") else "policy" for stage in STAGES}
RANKS = str(ROOT / "tests" / "ranks.py")


def start(processes: int, *arguments: object) -> "subprocess.Popen[str]":
    """A script or module on one process, or two."""
    command = [*(TORCHRUN if processes == 2 else [sys.executable]), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """What it printed; its status must be that."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err[-4000:]
    return out + err


@pytest.fixture(scope="module")
def done(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of a run with a supervised policy: a stage done by one process (-one), by two (-two), begun by the one and
    gone on by the other; and a language model's steps by one (shards-one), by two, and by one from what two wrote.
    """
    folder = tmp_path_factory.mktemp("ranks")
    run = prepare(store_folder, folder / "base", SplitSettings(reserve="event"))
    make_actions(run, SMALL_IDS)
    save_model(folder / "model", "qwen3", run.data.titles(range(run.data.n_items)))
    shutil.copytree(folder / "base", folder / "lm-base")
    train(run, NO_DROPOUT, SMALL_TRAIN)
    train(open_run(folder / "lm-base"), language_settings(folder / "lm-base"), replace(SMALL_TRAIN, epochs=1))
    for stage in STAGES:
        for name in ("one", "two", "one-then-two", "two-then-one"):
            shutil.copytree(base_of(folder, stage), folder / f"{stage}-{name}")
        run_stage(stage, folder / f"{stage}-one")
        run_stage(stage, folder / f"{stage}-one-then-two", stop=True)
    run_shards(folder / "shards-one", folder / "nothing")
    (folder / "said").write_text(finish(start(2, RANKS, folder)), encoding="utf-8")
    for stage in STAGES:
        assert list((folder / f"{stage}-two-then-one" / f"{NAMES[stage]}.training").glob("checkpoint-*"))
        run_stage(stage, folder / f"{stage}-two-then-one")
    run_shards(folder / "shards-again", folder / "shards-two")
    return folder


def base_of(folder: Path, stage: str) -> Path:
    """The run that a stage begins with."""
    return folder / ("lm-base" if stage.startswith("lm") else "base")


def apart(one: Path, two: Path) -> float:
    """Largest difference between the weights of two policies."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_make_the_updates_of_one(stage: str, done: Path) -> None:
    """Plain gradient steps (AdamW would magnify rounding where a gradient is near 0): weights within 1e-6.

    The validation is split over the ranks, and says the same; each epoch's metrics are written once.
    """
    one, two = (done / f"{stage}-{n}" / NAMES[stage] for n in ("one", "two"))
    assert apart(one, base_of(done, stage) / "policy") > 1e-3, "the updates must move the weights"
    assert apart(one, two) < 1e-6
    lines = [[kept(line) for line in read_metrics(folder)] for folder in (one, two)]
    assert len(lines[0]) == len(lines[1])
    for first, second in zip(*lines, strict=True):
        assert first == pytest.approx(second, abs=1e-5)
    assert stage == "lm-align" or any("valid_recall@10" in line for line in lines[1])


def kept(line: dict[str, Any]) -> dict[str, float]:
    """The metrics that do not say something of the first rank's rows alone."""
    of_all = ("valid", "reward/", "step", "loss_nats", "gradient_norm", "criterion")
    return {name: value for name, value in line.items() if name.startswith(of_all)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("numbers", ["one-then-two", "two-then-one"])
def test_a_checkpoint_is_taken_up_by_another_number_of_processes(stage: str, numbers: str, done: Path) -> None:
    """Stopped and gone on by more or fewer processes: the weights of one process that was never stopped."""
    one, other = (done / f"{stage}-{n}" / NAMES[stage] for n in ("one", numbers))
    assert apart(one, other) < 1e-6
    seconds = [json.loads(line).get("step") for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(set(seconds)), "each step is written once"


def test_the_ranks_said_that_they_resume(done: Path) -> None:
    said = (done / "said").read_text(encoding="utf-8")
    assert "resuming after epoch 1 of 3" in said
    assert "resuming after round 1 of" in said


def test_a_killed_rank_ends_the_job_and_leaves_a_checkpoint(
    done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sagerec train` under torchrun: the second rank is killed after the first epochs; one process goes on."""
    folder = tmp_path / "run"
    shutil.copytree(done / "base", folder)
    flags = ["train", str(folder), "--train.epochs", "200", "--train.batch-size", "16", "--train.device", "cpu"]
    flags += ["--policy.width", "32", "--policy.max-items", "20", "--train.validate-every", "0"]
    process = start(2, "-m", "sagerec.cli", *flags)
    work = folder / "policy.training"
    deadline = time.monotonic() + 300
    while not list(work.glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed = time.monotonic()
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    said = finish(process, status=1)
    assert time.monotonic() - killed < 60
    assert "another process of this job has ended, so that this one cannot go on; the same command" in " ".join(
        said.split()
    )
    (checkpoint,) = work.glob("checkpoint-*")
    reached = read_progress(checkpoint)["epoch"]
    settings = TrainSettings(epochs=200, batch_size=16, validate_every=0, device="cpu")
    monkeypatch.setattr(loop, "_is_done", lambda *_: True)  # the rest would take long
    with caplog.at_level(logging.INFO):
        train(open_run(folder), PolicySettings(width=32, max_items=20), settings)
    assert f"resuming after epoch {reached} of 200" in caplog.text


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank that torchrun started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"no rank {rank} of {launcher}")


def test_what_is_of_one_process_is_refused_under_torchrun(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", str(done / "base")]) == 2
    expected = (
        "torchrun starts 2 processes of sagerec evaluate, which is of one; start it without torchrun, or train and"
    )
    assert expected in " ".join(capsys.readouterr().err.split())


def test_a_lost_rank_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun alone: what gloo says where its peer is gone is a fault of its own elsewhere."""
    error = RuntimeError("[gloo/transport/tcp/pair.cc:546] Connection closed by peer [127.0.0.1]:30467")
    assert explain(error, [], while_parsing=False) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert explain(error, [], while_parsing=False) == (1, parallel.LOST)
    assert explain(RuntimeError("shapes differ"), [], while_parsing=False) is None


def test_a_rank_with_other_settings_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parallel, "share_from_first", lambda value: [{"epochs": 2}, {}])
    with pytest.raises(SettingsError, match=r"has another training than the first: got .*'epochs': 3.*, expected"):
        find_checkpoint(tmp_path, [{"epochs": 3}, {}], "training")


def test_two_ranks_share_the_weights_of_a_language_model(done: Path) -> None:
    """FSDP2 on a tiny Qwen3: the updates, norms and scores of one process within 1e-6, each rank writing its shards;
    what two wrote is read by one, and what one wrote by two.
    """
    one, two, again, resumed = (
        load_file(done / f"shards-{name}.safetensors") for name in ("one/whole", "two/whole", "again/read", "two/read")
    )
    assert len(list((done / "shards-two" / "checkpoint-000000003").glob("shard-*"))) == 2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
    weights = one.keys() - {"norms", "scores"}
    assert len(weights) > 20
    assert all(torch.equal(again[name], two[name]) for name in weights)
    assert all(torch.equal(resumed[name], one[name]) for name in weights)


def test_ranks_share_the_jobs_of_a_study(store_folder: Path, tmp_path: Path) -> None:
    """`sagerec compare` under torchrun gives the table of one process; the second rank does its part of the jobs."""
    flags = ["--objectives", "sage", "--seeds", "1", "--trials", "0", "--baselines", "popularity"]
    flags += ["--bootstrap-samples", "100", "--run.ids.levels", "2", "--run.ids.codebook-size", "16"]
    flags += ["--run.ids.text-dimensions", "16", "--run.ids.collaborative-dimensions", "16"]
    flags += ["--run.policy.width", "32", "--run.policy.max-items", "20", "--run.train.epochs", "1"]
    flags += ["--run.train.device", "cpu", "--run.evaluate.k", "10", "--run.evaluate.beams", "20"]
    flags += ["--align.slates", "4", "--align.epochs", "1", "--align.device", "cpu", "--align.validations", "1"]
    compare = ["-m", "sagerec.cli", "compare", store_folder]
    said = finish(start(2, *compare, *flags, "--out", tmp_path / "two"))
    finish(start(1, *compare, *flags, "--out", tmp_path / "one"))
    assert "is done; the other processes do theirs" in said
    one, two = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert first["metrics"] == second["metrics"]
    refused = finish(start(2, *compare, *flags, "--processes", "2", "--out", tmp_path / "two"), status=1)
    assert "processes is 2, and torchrun starts 2; leave it out" in " ".join(refused.split())


def test_the_tasks_of_a_study_are_split_and_what_fails_is_named(tmp_path: Path) -> None:
    """Two ranks, three tasks of which the second rank's fails: the others are done, and the first rank says whose."""
    said = finish(start(2, RANKS, tmp_path, "tasks"), status=1)
    assert "process 1 of the study: task 1 cannot be done" in " ".join(said.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-by-0", "2-by-0"]
