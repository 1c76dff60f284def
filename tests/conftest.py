"""Fixtures: a small simulated store, a small run of it, and where the real data is."""

import os
from pathlib import Path

import pytest
import torch

from sagerec.actions.semantic_ids.build import SemanticIds, SemanticIdSettings, read_semantic_ids
from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.policies.registry import PolicySettings
from sagerec.run.folder import Run as RunFolder
from sagerec.run.folder import open_run
from sagerec.run.stages import RunSettings, run_all
from sagerec.training.settings import TrainSettings

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
"""Of a process that runs the code of this tree, on one thread."""
SMALL_POLICY = PolicySettings(width=32, max_items=20)
SMALL_IDS = SemanticIdSettings(levels=2, codebook_size=16, text_dimensions=16, collaborative_dimensions=16)
SMALL_TRAIN = TrainSettings(epochs=2, batch_size=32, validate_every=1, validation_users=50, device="cpu")
SMALL_RUN = RunSettings(
    ids=SMALL_IDS,
    policy=SMALL_POLICY,
    train=SMALL_TRAIN,
    evaluate=EvaluateSettings(k=(5, 10), beams=10, bootstrap_samples=100),
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 150 users and 200 items."""
    folder = tmp_path_factory.mktemp("store") / "dataset"
    write_store(folder, simulate(StoreSettings(users=150, items=200, seed=3)))
    return folder


@pytest.fixture(scope="session")
def store_data(store_folder: Path) -> Dataset:
    """The dataset of `store_folder`."""
    return read_dataset(store_folder)


@pytest.fixture(scope="session")
def small_run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run over `store_folder`; tests must not change it."""
    out = tmp_path_factory.mktemp("run") / "run"
    run_all(store_folder, out, SMALL_RUN)
    return open_run(out)


def semantic_ids(run: RunFolder) -> SemanticIds:
    """The Semantic IDs of a run, with their codes."""
    return read_semantic_ids(run.folder / "semantic_ids")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real datasets; skips where it is absent."""
    folder = Path(os.environ.get("SAGEREC_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not (folder / "amazon-beauty").is_dir():
        pytest.skip(f"no real data: {folder}/amazon-beauty is absent; set SAGEREC_DATA")
    return folder
