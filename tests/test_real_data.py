"""The first stages on the real Amazon data; skipped where it is absent."""

from pathlib import Path

import numpy as np

from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.actions.semantic_ids.existing import read_existing
from sagerec.catalogue.dataset import read_dataset
from sagerec.catalogue.describe import describe
from sagerec.catalogue.splits import SplitSettings, make_split
from sagerec.run.stages import audit, make_actions, prepare
from tests.conftest import semantic_ids


def test_amazon_beauty_is_the_papers_benchmark(real_data: Path) -> None:
    """22,363 users, 12,101 items, 198,502 interactions; leave-one-out tests every user once."""
    data = read_dataset(real_data / "amazon-beauty")
    split = make_split(data, SplitSettings())
    figures = describe(data, split, cold_max_count=5)
    assert (figures["users"], figures["items"], figures["interactions"]) == (22_363, 12_101, 198_502)
    assert figures["parts"] == {"train": 153_776, "align": 0, "valid": 22_363, "test": 22_363}
    assert figures["repeated_items"] == 0
    reserved = make_split(data, SplitSettings(reserve="event"))
    assert reserved.counts()["align"] == 22_363


def test_amazon_industrial_keeps_its_own_split(real_data: Path) -> None:
    data = read_dataset(real_data / "amazon-industrial")
    split = make_split(data, SplitSettings())
    assert split.scheme == "column"
    assert split.counts() == {"train": 13_678, "align": 0, "valid": 4_532, "test": 4_533}


def test_amazon_industrial_brings_ids_of_its_own(real_data: Path) -> None:
    """MiniOneRec's: 3 levels of 256, 3,670 distinct for 3,686 items."""
    codes = read_existing(read_dataset(real_data / "amazon-industrial"), None)
    assert codes.shape == (3_686, 3)
    assert codes.max() == 255
    assert len(np.unique(codes, axis=0)) == 3_670


def test_semantic_ids_of_beauty_are_unique_and_audited(real_data: Path, tmp_path: Path) -> None:
    run = prepare(real_data / "amazon-beauty", tmp_path / "run", SplitSettings())
    make_actions(run, SemanticIdSettings())
    ids = semantic_ids(run)
    assert len(np.unique(ids.codes, axis=0)) == 12_101
    sizes = run.manifest("semantic_ids").sizes
    assert sizes["level_sizes"][:2] == [4096, 4096]
    assert sizes["collision_rate"] < 0.15
    assert sizes["reconstruction_error"][1] < sizes["reconstruction_error"][0] < 1
    [finding] = audit(run)
    assert finding.counts == {"train": 153_776, "align": 0, "valid": 0, "test": 0}
