"""The Ray that a job runs on."""

from __future__ import annotations

from core.config.base import Section, setting


class ClusterConfig(Section):
    """The Ray cluster that a job runs on."""

    address: str | None = setting(
        None,
        "Ray address to connect to, or `local` for a Ray of its own; null takes the cluster of "
        "the submitted job or RAY_ADDRESS, else local",
    )
    send_code: bool = setting(
        True,
        "send the working directory, Aerie's code, to the nodes; false where Aerie is installed "
        "on each of them. A submitted job's is sent by whoever submits it",
    )
    can_grow: bool = setting(
        True, "whether nodes may still join: wait for what is lacking, instead of refusing"
    )
    num_cpus: int | None = setting(None, "CPUs of a local Ray; null takes the machine's", ge=1)
    object_store_mb: int = setting(256, "object store of a local Ray, MB", ge=80)
