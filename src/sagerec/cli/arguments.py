"""How settings become flags."""

from pathlib import Path

import tyro

FLAT = tyro.conf.arg(name="")
Folder = tyro.conf.Positional[Path]
