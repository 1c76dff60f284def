"""A study folder that is there: its runs, and whether its table is still of them."""

import re
from pathlib import Path

from sagerec.files import read_record
from sagerec.run.folder import open_run
from sagerec.study.design import RUN, STUDY

SEED = re.compile(r"-s\d+$")


def stale_study(folder: Path) -> str | None:
    """Why the study.json of a folder is not of the runs in it; None where it is, or no run is there."""
    hashes = read_record(folder / STUDY).get("hashes", {})
    for path in run_folders(folder):
        if old := open_run(path).outdated(hashes if path.name == RUN else hashes.get(path.name, {})):
            return f"{folder / STUDY} is of an earlier {' and '.join(old)}; make it again with: sagerec compare"
    return None


def run_folders(study: Path) -> list[Path]:
    """The runs of a study, that of seed 0 first."""
    found = {int(path.name.rpartition("-s")[2]): path for path in study.glob(f"{RUN}-s*") if SEED.search(path.name)}
    folders = [study / RUN, *(found[seed] for seed in sorted(found))]
    return [path for path in folders if (path / "dataset").is_dir()]
