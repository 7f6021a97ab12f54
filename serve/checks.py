"""What is looked at before anything is served: the models, and whether there is room for them."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import ray
from transformers import AutoConfig

from core.config import Config
from core.draft.folder import load_head
from core.errors import ConfigError, InputError, ResourceError, UserError
from core.models.adapters import adapted_fingerprint, adapter_folder, check_adapters
from core.models.target import target_fingerprint, target_folder, target_location
from core.paths import PACKAGE_SCHEME, resolve_path
from core.progress import say
from core.runtime.connect import on_cluster
from serve.keys import admin_key_hashes, key_hashes
from serve.vllm import settings as vllm

NAME = "serve"


def check(config: Config) -> Config:
    """Read what the replicas will load; returns the config as other nodes can use it.

    Raises:
        InputError: a target, adapters or a head do not exist, or keys are not as they should be.
        ConfigError: a tree without a head to draft it.
        MismatchError: adapters or a head were trained for another target.
    """
    key_hashes(config.serve)
    admin_key_hashes(config.serve)
    checked = {}
    for name, model in config.served_models().items():
        try:
            checked[name] = _checked(model)
        except UserError as error:
            if not config.serve.models:
                raise
            raise type(error)(f"serve.models.{name}: {error}") from error
    return config.with_models(checked)


def _checked(config: Config) -> Config:
    """One model's."""
    try:
        target = target_folder(config.target.path)
        adapter = None if config.target.adapter is None else adapter_folder(config.target)
        head = config.draft.path and resolve_path(config.draft.path, field="draft.path")
    except UserError as error:
        raise InputError(
            f"{error}\n  set target.path and draft.path to what is there; "
            "configs/serve_smollm2.yaml needs nothing but itself"
        ) from error
    if config.serve.backend == "vllm":
        for sentence in vllm.check(config):
            say(NAME, sentence)
        say(NAME, f"vLLM {vllm.check_python(config)} decodes")
    # A folder by its full path: nodes have other working directories.
    places = {"path": target_location(str(config.target.path))}
    own, base = target_fingerprint(target), None
    if adapter is not None:
        check_adapters(target, adapter)
        own, base = adapted_fingerprint(target, adapter), own
        places["adapter"] = _location(str(config.target.adapter), adapter)
    if not head:
        if config.decode.total_tokens not in ("auto", 1) and not config.decode.ngram_match:
            raise ConfigError(
                f"decode.total_tokens={config.decode.total_tokens} needs a draft head; set "
                "draft.path, decode.ngram_match to draft by copying alone, or "
                "decode.total_tokens=auto"
            )
        say(NAME, "draft.path is not set: the target alone, without speculation")
        return config.replace(target=places)
    loaded = load_head(
        head,
        target_fingerprint=own,
        base_fingerprint=base,
        target_config=AutoConfig.from_pretrained(target),
    )
    if config.serve.backend == "vllm":
        vllm.check_head(loaded)
    return config.replace(target=places, draft={"path": _location(str(config.draft.path), head)})


def _location(named: str, found: Path) -> str:
    """An address in a package is looked up by each node, a path here has to be the full one."""
    return named if named.startswith(PACKAGE_SCHEME) else str(found.absolute())


def check_machine(config: Config) -> None:
    """Refuse what could never start; on a cluster, which may grow, nothing is refused.

    Raises:
        ResourceError: fewer CPUs or GPUs than the replicas ask for, or the port is taken.
    """
    check_room(config)
    if not on_cluster(config.cluster):
        check_port(config.serve.host, config.serve.port)


def check_room(config: Config) -> None:
    """The same for the replicas alone.

    Raises:
        ResourceError: fewer CPUs or GPUs than they ask for.
    """
    if on_cluster(config.cluster):
        return
    models, resources = config.served_models(), ray.cluster_resources()
    for name, field in (("CPU", "cpus_per_replica"), ("GPU", "gpus_per_replica")):
        parts = [(one.serve.replicas, getattr(one.serve, field)) for one in models.values()]
        # Those that may do without a replica take turns, if need be.
        largest = max(each if not replicas else 0.0 for replicas, each in parts)
        wanted, there = sum(math.prod(part) for part in parts) + largest, resources.get(name, 0.0)
        if wanted > there:
            shown = " + ".join(f"{replicas} × {each:g}" for replicas, each in parts)
            of = f", for {', '.join(models)}," if config.serve.models else ""
            raise ResourceError(
                f"serve.replicas × serve.{field}: {shown}{of} need {wanted:g} {name}s, "
                f"{there:g} are there; lower one of them"
            )


def surge_that_fits(config: Config) -> Config:
    """Where no further replica has room, an old one has to stop before its successor starts."""
    models, resources = config.served_models(), ray.cluster_resources()
    settings = [one.serve for one in models.values()]
    cpus = sum((one.most_replicas + 1) * one.cpus_per_replica for one in settings)
    gpus = sum((one.most_replicas + 1) * one.gpus_per_replica for one in settings)
    fits = cpus <= resources.get("CPU", 0.0) and gpus <= resources.get("GPU", 0.0)
    if fits or on_cluster(config.cluster):
        return config
    stopping_first = {"max_surge_percent": 0}
    return config.with_models(
        {name: one.replace(serve=stopping_first) for name, one in models.items()}
    )


def check_port(host: str, port: int) -> None:
    """Listen for a moment, as the HTTP server will do for long.

    Raises:
        ResourceError: it cannot.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ResourceError(
            f"serve.host={host} serve.port={port}: cannot listen there ({error.strerror}); "
            "choose another serve.port, or stop what uses it"
        ) from error
