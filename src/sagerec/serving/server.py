"""Starts the processes that serve."""

import ipaddress
import logging
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from sagerec.config import from_json, require, to_json
from sagerec.errors import MissingExtraError
from sagerec.files import read_json, write_json
from sagerec.run.folder import check_name
from sagerec.serving.settings import ServeSettings
from sagerec.serving.versions import begin

logger = logging.getLogger(__name__)
STATE = "SAGEREC_STATE"
"""Environment variable that tells a worker where its server's state is."""
HEALTH_SECONDS = 60
"""Silence after which a worker is taken for dead: one that starts on a busy machine is slow to answer."""


def serve(run: Path, settings: ServeSettings) -> None:
    """Serve a run until SIGTERM or SIGINT.

    Raises: ArtifactError, SettingsError; MissingExtraError without the extra.
    """
    try:
        import uvicorn

        from sagerec.serving.gate import ADMIN_TOKEN, TOKEN, log_as_json
        from sagerec.serving.metrics import FOLDER_VARIABLE
    except ImportError as error:
        raise MissingExtraError(
            f'{error.name} is not installed, and serving needs it; install it with: pip install "sagerec[serve]"'
        ) from error
    for name in settings.policy:
        check_name(name, "policy")
    for variable in (TOKEN, ADMIN_TOKEN):
        require(os.environ.get(variable, "x").isascii(), f"{variable} is not ASCII; expected plain letters and digits")
    with ExitStack() as stack:
        # What uvicorn catches it raises again once all is answered: then the state goes too, and the status is 0.
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        state = settings.state
        if state is None:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sagerec-serve-")))
        state = state.absolute()
        record = begin(run, state, settings.policy)
        write_json(state / "settings.json", {"run": str(run.absolute()), **to_json(replace(settings, state=None))})
        os.environ[STATE] = str(state)
        if settings.workers > 1:
            counts = state / "metrics"
            counts.mkdir(exist_ok=True)
            os.environ[FOLDER_VARIABLE] = str(counts)
        if not is_loopback(settings.host) and not os.environ.get(TOKEN):
            logger.warning("listening at %s without %s: whoever reaches it may ask", settings.host, TOKEN)
        logger.info("version %s at http://%s:%d", record.current, settings.host, settings.port)
        log_as_json()
        uvicorn.run(
            "sagerec.serving.server:make_app",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            access_log=False,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
            timeout_worker_healthcheck=HEALTH_SECONDS,
            log_config=None,
        )


def make_app() -> Any:
    """The application of a worker, as its server says."""
    from sagerec.serving.app import create_app
    from sagerec.serving.gate import log_as_json

    log_as_json()
    state = Path(os.environ[STATE])
    values = read_json(state / "settings.json")
    return create_app(Path(values.pop("run")), state, from_json(ServeSettings, values))


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
