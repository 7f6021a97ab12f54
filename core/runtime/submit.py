"""Submit a command through Ray's jobs API, follow its log, pass its exit code on."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Sequence
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from core.errors import EXIT_FAILURE, EXIT_USER_ERROR, InputError, StageError
from core.progress import say
from core.provenance import GIT_REVISION_VARIABLE, git_revision

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
AGENT_SECONDS = 180.0


class NoJobsAgent(StageError):
    """A Ray that does not take jobs: another one on this machine holds its agent's port."""


def submit(
    module: str,
    arguments: Sequence[str],
    address: str | None = None,
    *,
    python: str = "python",
    patience: float = AGENT_SECONDS,
) -> int:
    """Run `python -m <module> <arguments>` on a cluster, as `ray job submit` would.

    Args:
        module: such as `jobs.train_draft`.
        arguments: its command line.
        address: the dashboard's address; None takes RAY_API_SERVER_ADDRESS or this machine's.
        python: the interpreter's name on the cluster's head.
        patience: seconds until a Ray that has just been started must accept jobs.
    Returns:
        The exit code of the command, which `ray job submit` itself would turn into 1.
    Raises:
        InputError: there is no such cluster.
        NoJobsAgent: it accepts no jobs.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray dashboard answers at {address} ({error}); start a cluster "
            "(`ray start --head`) or give its address with --address"
        ) from error
    entrypoint = shlex.join([python, "-m", module, *arguments])
    # `.rayignore` leaves out .git already; Ray would warn that it does so too.
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    job_id = _submit_when_ready(client, entrypoint, patience)
    say("submit", f"{job_id}: {entrypoint}")
    try:
        asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        client.stop_job(job_id)
        raise
    info = client.get_job_info(job_id)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    said = (info.message or "").partition(",")[0]
    say("submit", f"{job_id} {info.status.value.lower()}: {said}")
    return EXIT_USER_ERROR if info.driver_exit_code == EXIT_USER_ERROR else EXIT_FAILURE


def _submit_when_ready(client: JobSubmissionClient, entrypoint: str, patience: float) -> str:
    """Submit; a Ray that has just been started takes some seconds until it accepts jobs."""
    environment: dict[str, Any] = {"working_dir": "."}
    if revision := git_revision():
        environment["env_vars"] = {GIT_REVISION_VARIABLE: revision}
    deadline = time.monotonic() + patience
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise NoJobsAgent(
                    f"this Ray accepted no job for {patience:.0f} s; does another Ray on the "
                    "machine of its head hold its agent's port? End that one and submit again"
                ) from error
        time.sleep(1)


async def _follow(client: JobSubmissionClient, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        print(text, end="", flush=True)
