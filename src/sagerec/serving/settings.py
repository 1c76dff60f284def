"""How a run is served, and the bounds that no setting moves."""

from dataclasses import dataclass
from pathlib import Path

from sagerec.config import above, at_least, between, check_fields

MAX_BODY_BYTES = 2**20
"""Bytes of a request."""
MAX_K = 1000
"""Items of a list."""
MAX_SLATE = 100
"""Items of a slate."""
MOST_PLACES = 1280
"""Places of what is decoded place by place at a time; a request that comes then waits for all of them."""
SHOWN = 60
"""Characters of what was got that an error repeats."""
MAX_IDS = 10_000
"""Item ids of a history, or of a filter."""
MAX_PROFILE = 4_000
"""Characters of a user's profile."""
MAX_ROWS = 256
"""Queries of one batch request."""
COLD_EVENTS = 5
"""Items with at most this many interactions in what was learnt are cold."""
FILTER_BYTES = 2**28
"""Memory of the filters that are kept."""
BEAMS = 50
"""Beams of the first pass."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How a run is served."""

    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    policy: tuple[str, ...] = ()
    """Policies of the run that are served, the first by default; all that fit, `policy` first, if none is given."""
    workers: int = 1
    """Processes; they share the memory-mapped trie and weights."""
    threads: int = 1
    """Threads that each worker decodes with."""
    batch: int = 128
    """Queries decoded at a time, at most."""
    batch_bytes: int = 2**29
    """Memory that a batch may take; large catalogues are decoded in smaller batches."""
    wait_seconds: float = 0.002
    """How long a query waits for others while nothing is being decoded."""
    queue: int = 512
    """Queries that wait, at most; more are refused with 429."""
    timeout_seconds: float = 10.0
    """Time of a request, from its first byte to its answer."""
    shutdown_seconds: float = 20.0
    """Time that requests under way have after SIGTERM."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    state: Path | None = None
    """Folder for the versions in use, whose files are links to the run's where they can be; a temporary one if not
    given."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            port=between(0, 65535),
            workers=at_least(1, 256),
            threads=at_least(1, 1024),
            batch=at_least(1, 65536),
            batch_bytes=at_least(2**20, 2**50),
            wait_seconds=between(0, 10),
            queue=at_least(1),
            timeout_seconds=above(0, 3600),
            shutdown_seconds=above(0, 3600),
        )
