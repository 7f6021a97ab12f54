"""The one place that connects to Ray."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import ray

from core.config import ClusterConfig
from core.errors import ConfigError, InputError

# Ray sets this in the driver of a submitted job; its working directory is uploaded already.
SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

WORKING_DIRECTORY = Path.cwd()
UNPACK_SECONDS = 30.0

JOBS_AGENT_PORT = 52365
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"

# Where nobody can look at them, Ray's samples of each process and each worker's reports are work
# in vain, on the cores that replicas compute on.
WITHOUT_METRICS = {"RAY_enable_metrics_collection": "0", "REPORTER_UPDATE_INTERVAL_MS": "3600000"}

# Ray's workers must not each start a thread pool as large as the machine.
WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}


def inside_submitted_job() -> bool:
    """Whether this process is the entrypoint of a job that Ray started."""
    return SUBMITTED_JOB_VARIABLE in os.environ


def return_to_working_directory() -> None:
    """Enter the working directory again, in case Ray has unpacked it anew.

    Raylets that share a machine share the folder, and the second one to need it replaces it,
    which leaves a running job in a folder that is deleted.
    """
    deadline = time.monotonic() + UNPACK_SECONDS
    while inside_submitted_job():
        try:
            os.chdir(WORKING_DIRECTORY)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def ray_address(config: ClusterConfig) -> str:
    """The address that `connect` will use: `local`, `auto` (the job's cluster), or explicit."""
    if config.address:
        return config.address
    if inside_submitted_job():
        return "auto"
    # Never Ray's own default: it would try a cluster that was killed and left its address behind.
    return os.environ.get("RAY_ADDRESS") or "local"


def on_cluster(config: ClusterConfig) -> bool:
    """Whether other machines may be involved, so that relative paths mean nothing."""
    return ray_address(config) != "local"


def jobs_api_is_free(wait_seconds: float = 30.0) -> bool:
    """Whether a Ray started here can offer the jobs API.

    Its agent has a fixed port, which another Ray on this machine may hold; one that was killed
    gives it back within seconds, hence the wait.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", JOBS_AGENT_PORT))
            except OSError:
                if time.monotonic() > deadline:
                    return False
            else:
                return True
        time.sleep(0.5)


def connect(config: ClusterConfig, *, dashboard: bool = False, metrics: bool = False) -> None:
    """Connect to Ray, or start it on this machine; does nothing if that has been done.

    Args:
        config: which Ray.
        dashboard: start the dashboard, and with it the jobs API, where Ray is started here.
        metrics: collect Ray's metrics there; with a dashboard they always are.
    """
    if ray.is_initialized():
        return
    address = ray_address(config)
    if address not in ("local", "auto") and "://" not in address:
        _check_answers(address)
    environment: dict[str, Any] = {"env_vars": WORKER_ENVIRONMENT}
    settings: dict[str, Any] = {}
    if address == "local":
        # It announces that the token is on, which is as it should be on a machine of one's own.
        logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)
        # Ray's workers give way to all other processes, but here they do what the user waits for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if not (dashboard or metrics):
            for name, value in WITHOUT_METRICS.items():
                os.environ.setdefault(name, value)
        settings = {
            "num_cpus": config.num_cpus,
            "object_store_memory": config.object_store_mb * 10**6,
            "include_dashboard": dashboard,
            # Ray Train warns every second that it cannot ask a dashboard which is not there.
            "logging_config": ray.LoggingConfig(log_level="ERROR"),
        }
    elif config.send_code and not inside_submitted_job():
        environment["working_dir"] = "."
    try:
        ray.init(address=address, runtime_env=environment, logging_level="warning", **settings)
    except ConnectionError as error:
        raise _no_ray(address, error) from error


def _check_answers(address: str) -> None:
    """Make sure that something listens there; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"cluster.address={address} (or RAY_ADDRESS): expected host:port of a cluster's head "
            "(6379 unless it was started with another), ray://host:port, auto or local"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_ray(address, error) from error


def _no_ray(address: str, error: Exception) -> InputError:
    return InputError(
        f"no Ray answers at {address} (from cluster.address or RAY_ADDRESS): {error}; start a "
        "cluster there (`ray start --head`), or unset it to run on this machine alone"
    )
