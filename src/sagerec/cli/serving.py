"""The command that serves."""

from dataclasses import dataclass, field
from typing import Annotated

from sagerec.cli.arguments import FLAT, Folder
from sagerec.serving.server import serve
from sagerec.serving.settings import ServeSettings


@dataclass(frozen=True)
class Serve:
    """Answer requests over HTTP, and show a page to try it (docs/serving.md). Needs the extra: sagerec[serve].

    Example: sagerec serve RUN --port 8000 --policy policy-sage policy
    """

    run: Folder
    """Run folder."""
    settings: Annotated[ServeSettings, FLAT] = field(default_factory=ServeSettings)
    """How it is served."""

    def __call__(self) -> None:
        serve(self.run, self.settings)
