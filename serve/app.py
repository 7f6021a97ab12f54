"""The Ray Serve application: an ingress that speaks HTTP, and replicas that decode.

Import it as `from serve.app import build_app`: `import serve.app` after `from ray import serve`
binds the name `serve` anew.
"""

# No `from __future__ import annotations`: Ray Serve reads the type of `build_app`'s argument at
# run time.

import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import list_named_actors

from core.config import Config, DecodeConfig, ServeConfig
from core.errors import BusyError, UserError
from serve.api import build_api
from serve.arguments import Arguments, RefusedError
from serve.autoscaling import BacklogPolicy
from serve.desk import Decision, Head, HeadDesk
from serve.errors import ApiError, internal_error, refused
from serve.generation import RETRY_AFTER_S, Event, Generation, Prompt, Rejected, Tokens
from serve.keys import admin_key_hashes, key_hashes
from serve.models import Served
from serve.reading import not_now
from serve.recent import Recent
from serve.replica import DecoderReplica
from serve.retry import ReplicaLostError, lost_for_good
from serve.routing import PrefixRouter
from serve.traffic import Traffic
from serve.vllm.replica import VllmReplica, leave

# Deployments; with several models, one of each a model: see `deployment_name`.
DECODER = "Decoder"
# Its `user_config` {"path": …, "canary": …} brings a draft head into service.
DESK = "Heads"
# What may be in a replica beyond those it decodes and those that wait in it: it refuses them
# itself, at once, where the router would let them wait.
MAX_REFUSED_AT_ONCE = 64
# What may be in the ingress beyond the requests at work: those that it refuses, at once, and those
# that are always answered, such as health checks.
INGRESS_RESERVE = 256
# A replica that is replaced first finishes what it has begun.
GRACEFUL_SHUTDOWN_S = 600.0
# How often replicas tell of their load, and how long that counts.
METRICS_EVERY_S, LOOK_BACK_S = 1.0, 10.0
# Failed starts before a deployment is given up. A broken config fails every time.
MAX_STARTS = 2

QUEUE_FULL = not_now(
    BusyError("too many requests wait already; try again later"), 429, "queue_full"
)
HEAD_IS_FIXED = (
    "vLLM reads its draft head when it starts, so serve.backend=vllm cannot change it at work; set "
    "draft.path in the configuration and have the server read it again (kill -HUP)"
)

logger = logging.getLogger("ray.serve")


class DecoderReplicas:
    """The decoder's deployment, of which each request takes one replica."""

    def __init__(self, handle: DeploymentHandle, retries: int) -> None:
        self._handle, self._retries = handle, retries
        self._streaming = handle.options(stream=True)
        self._running = Recent(self._running_replicas)

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        """A replica's events. Closing this, as a lost client does, stops the generation."""
        response = self._streaming.generate.remote(request)
        try:
            async for event in response:
                yield event
        except RayActorError as error:
            raise ReplicaLostError(str(error)) from error
        except BackPressureError:
            # As a full replica says it: whose replica died was let in, and waits.
            yield QUEUE_FULL
        except Exception as error:
            raise _api_error(error) from error
        except BaseException:
            # Nobody waits any more. Of a call that has failed, this would raise the failure again.
            response.cancel()
            raise

    async def tokenize(self, prompt: Prompt, field: str) -> Tokens | Rejected:
        """The tokens that a prompt is read as."""
        return await self._ask(self._handle.tokenize, prompt, field)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Rejected:
        """The text of tokens."""
        return await self._ask(self._handle.detokenize, token_ids)

    async def running(self) -> int:
        """How many replicas run, as Ray Serve's controller knows."""
        try:
            return await self._running.get()
        except Exception as error:
            logger.warning("Ray Serve's controller does not say what runs", exc_info=error)
            raise ApiError(
                503,
                "Ray Serve's controller does not say how many replicas run; try again later",
                code="status_unknown",
                retry_after_s=RETRY_AFTER_S,
            ) from error

    def _running_replicas(self) -> int:
        handle = self._handle
        return running_replicas(handle.app_name, handle.deployment_name)

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        for _ in range(self._retries + 1):
            try:
                return await method.remote(*arguments)
            except RayActorError as error:
                logger.warning("a replica died in mid-request", exc_info=error)
            except Exception as error:
                raise _api_error(error) from error
        raise lost_for_good(self._retries)


class ServedReplica(DecoderReplica):
    """A decoder replica that follows the desk's deployment."""

    def __init__(self, config: Config, desk: DeploymentHandle) -> None:
        super().__init__(config, desk.report.remote)


class ServedVllmReplica(VllmReplica):
    """One that vLLM decodes for; when vLLM's server dies, so does the replica."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, on_end=leave)


class ServedDesk:
    """The desk's deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def propose(self, path: str, share: float | None = None) -> Head:
        """See `HeadDesk`."""
        return await self._ask(self._handle.propose, path, share)

    async def abort(self) -> Decision:
        """See `HeadDesk`."""
        return await self._ask(self._handle.abort)

    async def settled(self, number: int, timeout_s: float) -> Decision | None:
        """See `HeadDesk`."""
        return await self._ask(self._handle.settled, number, timeout_s)

    async def status(self) -> dict[str, Any]:
        """See `HeadDesk`."""
        return await self._ask(self._handle.status)

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        try:
            return await method.remote(*arguments)
        except RayTaskError as error:
            # Ray's own is of the cause's type too, but tells all of its traceback.
            raise error.cause from error


def _autoscaling(config: ServeConfig, decode: DecodeConfig) -> AutoscalingConfig:
    log = config.autoscaling_log
    return AutoscalingConfig(
        min_replicas=config.replicas,
        max_replicas=config.most_replicas,
        policy=AutoscalingPolicy(
            policy_function=BacklogPolicy,
            policy_kwargs={"target_backlog_s": config.target_backlog_s, "log": log},
        ),
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        metrics_interval_s=METRICS_EVERY_S,
        look_back_period_s=LOOK_BACK_S,
        # Of Serve's own policy, which is only written down beside ours: a replica whose batch is
        # full wants another one.
        target_ongoing_requests=decode.batch_size,
    )


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        return refused(QUEUE_FULL)
    if isinstance(error, DeploymentUnavailableError):
        return ApiError(
            503,
            "no replica of this model could be started, see the server's log; try again later",
            code="no_replica",
            retry_after_s=RETRY_AFTER_S,
        )
    logger.error("the decoder failed", exc_info=error)
    return internal_error()


def running_replicas(application: str, deployment: str) -> int:
    """As Serve's controller counts them.

    After a `serve deploy` that failed, it names no deployments until the next one, though those
    there are go on. Then their actors are counted.
    """
    found = ray_serve.status().applications.get(application)
    if found is None or not found.deployments:
        prefix = f"SERVE_REPLICA::{application}#{deployment}#"
        actors: list[Any] = list_named_actors(all_namespaces=True)
        return sum(str(actor["name"]).startswith(prefix) for actor in actors)
    if deployment not in found.deployments:
        return 0
    return found.deployments[deployment].replica_states.get("RUNNING", 0)


@ray_serve.deployment(
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
    # The next one takes over before this one stops.
    max_surge_percent=100,
)
@ray_serve.ingress()
class Ingress:
    """Turns HTTP into requests for the decoder replicas and their events into HTTP."""

    def __init__(
        self,
        models: Mapping[str, tuple[DeploymentHandle, DeploymentHandle, ServeConfig]],
        config: ServeConfig,
    ) -> None:
        """Remember what answers.

        Args:
            models: of each its decoder, its desk and its own section serve.
            config: of the HTTP service.
        """
        self._models, self._config = models, config
        self._traffic = Traffic(config.max_requests)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve, after the constructor."""
        served = [
            Served(name, DecoderReplicas(decoder, config.retries), ServedDesk(desk), config)
            for name, (decoder, desk, config) in self._models.items()
        ]
        return build_api(served, self._config, self._traffic)

    async def drain(self) -> int:
        """Take no new requests; how many have not ended."""
        return self._traffic.drain()


def build_app(args: Arguments) -> ray_serve.Application:
    """The application for `serve run serve.app:build_app` and Serve's YAML; see `Arguments`.

    Does what `aerie serve` does before: makes the target if need be, and reads what the replicas
    will load.

    Raises:
        RefusedError: it cannot be served; Serve shows the message.
    """
    # torch is imported in here and not above: the ingress imports this file, and needs none of it.
    from core.runtime.conversion import with_converted_target
    from serve.checks import check

    try:
        return application(check(with_converted_target(args)))
    except UserError as error:
        raise RefusedError(str(error)) from error


def application(config: Config) -> ray_serve.Application:
    """The application of a configuration that has been checked.

    Args:
        config: reads `target`, `draft`, `decode` and `serve`, of each of its models.
    Raises:
        UserError: see `key_hashes`.
    """
    models = {name: _model(name, one, config) for name, one in config.served_models().items()}
    # Read here: the ingress may be on another node.
    keys = {"api_keys": key_hashes(config.serve), "admin_keys": admin_key_hashes(config.serve)}
    # Below this, the guard refuses and health checks are answered; at it, Serve lets all wait.
    ingress: Any = Ingress.options(  # type: ignore[attr-defined]
        max_ongoing_requests=config.serve.max_requests + INGRESS_RESERVE
    )
    return ingress.bind(models, config.serve.model_copy(update=keys))


def deployment_name(kind: str, model: str, config: Config) -> str:
    """`Decoder`, or with several models `Decoder:smollm2`.

    Files are named after deployments; `~` is in no model's name.
    """
    return f"{kind}:{model.replace('/', '~')}" if config.serve.models else kind


def _model(name: str, one: Config, whole: Config) -> tuple[Any, Any, ServeConfig]:
    """The deployments of a model, and its own section serve."""
    by_vllm = one.serve.backend == "vllm"
    desk: Any = ray_serve.deployment(
        HeadDesk, name=deployment_name(DESK, name, whole), ray_actor_options={"num_cpus": 0}
    )
    head_desk = desk.bind(
        one.draft.path,
        rounds=one.serve.canary_rounds,
        gain=one.serve.canary_gain,
        fixed=HEAD_IS_FIXED if by_vllm else None,
    )
    decoder = _decoder(deployment_name(DECODER, name, whole), one)
    decoders = decoder.bind(one) if by_vllm else decoder.bind(one, head_desk)
    return decoders, head_desk, one.serve


def _decoder(name: str, config: Config) -> Any:
    settings, decode = config.serve, config.decode
    return ray_serve.deployment(
        ServedVllmReplica if settings.backend == "vllm" else ServedReplica,
        name=name,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
        },
        autoscaling_config=_autoscaling(settings, decode),
        # More in one replica than a part of a batch would be waited for longer than read anew.
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"most_ahead": max(1, decode.batch_size // 4)},
        ),
        max_ongoing_requests=decode.batch_size + decode.max_waiting + MAX_REFUSED_AT_ONCE,
        # Ray counts as queued who is being placed: so many may come at once.
        max_queued_requests=decode.max_waiting + MAX_REFUSED_AT_ONCE,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        max_surge_percent=settings.max_surge_percent,
        max_constructor_retry_count=MAX_STARTS,
    )
