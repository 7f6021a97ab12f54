"""The speculative decoder: how it decodes, what is measured side by side, how it is served."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from core.config.base import Section, field, setting

# A part of the names of its deployments, and with that of files.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]
ModelSection = Literal["target", "draft", "decode", "serve"]
MODEL_SECTIONS: tuple[str, ...] = ("target", "draft", "decode", "serve")
# Of the section serve, what a model of several may have for itself; the rest is the HTTP server's.
PER_MODEL = (
    "replicas",
    "max_replicas",
    "target_backlog_s",
    "upscale_delay_s",
    "downscale_delay_s",
    "max_surge_percent",
    "autoscaling_log",
    "cpus_per_replica",
    "gpus_per_replica",
    "max_new_tokens",
    "canary_rounds",
    "canary_gain",
    "retries",
    "deadline_s",
    "max_round_s",
    "backend",
    "vllm_python",
    "vllm_arguments",
    "vllm_start_s",
)
ANY_NAME = "aerie"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DecodeConfig(Section):
    """The speculative decoder."""

    total_tokens: int | Literal["auto"] = field(
        "auto",
        "nodes of the draft tree, the root included; 1 is plain decoding; auto measures what "
        "pays on this machine",
    )
    depth: int = field(5, "expansions after the root's (the tree is one deeper)", ge=0, le=16)
    top_k: int = field(10, "children an expansion, and nodes kept a level", ge=1, le=64)
    ngram_match: int = field(
        0,
        "tokens at the end of the text that must have occurred before, in prompt or output, for "
        "what followed them to be drafted too, with or without a draft head; 0 copies nothing",
        ge=0,
        le=16,
    )
    ngram_branches: int = field(
        3, "matches that are copied a round, depth + 1 tokens each; total_tokens bounds all", ge=1
    )
    temperature: float = field(0.0, "0 is greedy", ge=0)
    top_p: float = field(1.0, "nucleus of the target's distribution", gt=0, le=1)
    sample_top_k: int = field(0, "likeliest tokens that are sampled from; 0 takes all", ge=0)
    min_p: float = field(
        0.0,
        "least probability that is sampled, as a share of the likeliest token's; 0 takes all",
        ge=0,
        le=1,
    )
    repetition_penalty: float = field(
        1.0,
        "logits of tokens in prompt or output are divided by it where positive, else multiplied; "
        "1 leaves them",
        gt=0,
    )
    presence_penalty: float = field(
        0.0, "taken off the logit of each token in the output", ge=-2, le=2
    )
    frequency_penalty: float = field(
        0.0, "taken off as often as the output has the token", ge=-2, le=2
    )
    max_context: int = field(
        4096, "longest sequence, in tokens: prompt, output and tree together", ge=32
    )
    cache_tokens: int = setting(
        16384,
        "rows of the KV cache, in tokens: of all sequences that are decoded at the same time, or "
        "were not long ago; bounds the cache's memory",
        ge=32,
    )
    batch_size: int = setting(16, "most sequences decoded at the same time", ge=1)
    max_waiting: int = setting(64, "requests that may wait for their turn; more are refused", ge=1)
    prefill_chunk: int = setting(
        512, "tokens of prompts read a round: how long the other sequences may be held up", ge=1
    )
    reuse_prefixes: bool = setting(
        True,
        "keep what was computed for an answer while there is room, for a request that begins with "
        "the same tokens, such as a conversation's next turn",
    )

    @property
    def most_tokens(self) -> int:
        """Nodes that are ever proposed, the root included; no tree is larger."""
        return 1 + self.top_k + self.depth * self.top_k**2

    @model_validator(mode="after")
    def _tree_fits(self) -> DecodeConfig:
        if self.total_tokens != "auto" and not 1 <= self.total_tokens <= self.most_tokens:
            raise ValueError(
                f"decode.total_tokens={self.total_tokens} is outside 1..{self.most_tokens}, which "
                f"top_k={self.top_k} and depth={self.depth} allow; change one of them"
            )
        return self


class BenchmarkConfig(Section):
    """What is measured side by side."""

    name: Literal["extraction", "training", "decoding"] = field(
        "extraction",
        "extraction: features the reference way (batch 1, one file a sample), by the bare loop, "
        "and by the Ray pipeline; training: a head by EAGLE's step (padded batches, the whole "
        "vocabulary at every position) and by Aerie's; decoding: passes of a few tokens and plain "
        "decoding, beside the model's own forward and transformers' generate",
    )
    repeats: int = field(3, "times that every way is run, in turn", ge=1)
    max_tokens: int = field(40000, "tokens that a way goes through in a repeat", ge=256)


class ServeConfig(Section):
    """The HTTP service."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on", ge=1, le=65535)
    model_name: str = setting(
        ANY_NAME,
        "the model's name in the API; with `models`, which of them answers requests that name "
        "none, and the first one unless it is set",
    )
    models: dict[ModelName, dict[ModelSection, dict[str, Any]]] = setting(
        {},
        "several models behind one address: of each, by its name in the API, what it has otherwise "
        "than the sections target, draft, decode and serve say, such as "
        "{plain: {draft: {path: null}}, legal: {target: {adapter: …}, serve: {replicas: 2}}}",
    )
    replicas: int = setting(
        1,
        "least decoder replicas; with 0, the last one goes after downscale_delay_s without "
        "requests, and the next request waits until one has started",
        ge=0,
    )
    max_replicas: int | None = setting(
        None, "most decoder replicas under load; null takes `replicas`, or 1 if that is 0", ge=1
    )
    target_backlog_s: float = setting(
        20.0,
        "seconds for which a replica should have work, by what its requests will likely still be "
        "given and its measured tokens a second; with more, replicas are added",
        gt=0,
    )
    upscale_delay_s: float = setting(
        15.0, "seconds for which more replicas must be wanted before they are added", ge=0
    )
    downscale_delay_s: float = setting(
        300.0, "seconds for which fewer must be wanted before one is taken away", ge=0
    )
    max_surge_percent: int = setting(
        100,
        "replicas that an update may start before it stops old ones, in % of those there are; "
        "with 0, or on one machine without room for another one, requests wait meanwhile",
        ge=0,
        le=100,
    )
    autoscaling_log: str | None = setting(
        None,
        "file, where Serve's controller runs, to which the inputs and decisions of autoscaling "
        "are appended, a JSON line each",
    )
    cpus_per_replica: float = setting(2.0, "CPUs a replica; also its threads", gt=0)
    gpus_per_replica: float = setting(0.0, "GPUs a replica", ge=0)
    backend: Literal["aerie", "vllm"] = setting(
        "aerie",
        "what decodes: Aerie's own decoder, or vLLM's server, whose drafts are chains of "
        "decode.depth + 1 tokens and no trees",
    )
    vllm_python: str | None = setting(
        None, "vllm: the Python of an environment with vLLM, on every node; null is this one"
    )
    vllm_arguments: tuple[str, ...] = setting(
        (), "vllm: further arguments of its server, such as --gpu-memory-utilization=0.8"
    )
    vllm_start_s: float = setting(
        900.0, "vllm: seconds after which a server that is not ready is given up", gt=0
    )
    max_new_tokens: int = setting(512, "tokens generated where a request names no limit", ge=1)
    api_keys: tuple[Sha256, ...] = setting(
        (), "SHA-256, in hexadecimal, of the keys that clients may have; none of all lets all in"
    )
    api_keys_file: str | None = setting(
        None, "file with a key's SHA-256 a line, besides api_keys; # begins a comment"
    )
    api_keys_env: str | None = setting(
        None, "environment variable of the starting process with keys, separated by commas"
    )
    admin_keys: tuple[Sha256, ...] = setting(
        (), "SHA-256 of the keys for /admin, which nobody else may call; none closes it"
    )
    admin_keys_env: str | None = setting(
        None, "environment variable of the starting process with keys for /admin"
    )
    canary_rounds: int = setting(
        500, "rounds that a draft head on trial and the one in use must have to be compared", ge=1
    )
    canary_gain: float = setting(
        0.0,
        "share by which the trial's accepted length must be longer; below 0 it may be shorter",
        gt=-1,
    )
    max_request_bytes: int = setting(1_000_000, "longest body of a request", ge=1024)
    body_timeout_s: float = setting(
        30.0, "seconds within which the body of a request must have come", gt=0
    )
    max_requests: int = setting(
        1000,
        "requests that may be at work at a time, those included whose body is still to come; "
        "more are refused",
        ge=1,
    )
    retries: int = setting(
        3, "other replicas that a request is asked of when the one that answers it dies", ge=0
    )
    requests_per_minute: int | None = setting(
        None, "requests that a key (or, without keys, an address) may make; null is no limit", ge=1
    )
    deadline_s: float = setting(
        600.0, "seconds after which an answer is given up, its waiting included", gt=0
    )
    max_round_s: float = setting(
        300.0,
        "seconds after which a round of the decoder counts as hung, and its replica is replaced; "
        "a long prompt takes many rounds (decode.prefill_chunk)",
        gt=0,
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "origins whose pages browsers let talk to the server, such as https://chat.example.org; "
        "* is all, none leaves it to the server's own page",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting(
        "INFO", "least level of what is logged; at INFO, a line a request"
    )

    @property
    def most_replicas(self) -> int:
        """That there can be at one time, updates aside."""
        return self.max_replicas or max(1, self.replicas)

    @field_validator("models", mode="before")
    @classmethod
    def _nothing_is_changed(cls, value: Any) -> Any:
        """In YAML, a model or a section without a line is null."""
        if not isinstance(value, dict):
            return {} if value is None else value
        return {name: _filled(sections) for name, sections in value.items()}


def _filled(sections: Any) -> Any:
    if isinstance(sections, dict):
        return {name: {} if fields is None else fields for name, fields in sections.items()}
    return {} if sections is None else sections


def check_models(serve: ServeConfig) -> None:
    """What of `serve.models` can be told without the other sections.

    Raises:
        ValueError: a field that all models share, a default that is none of them, or bounds of
            the replicas that exclude each other.
    """
    for name, changes in serve.models.items():
        for field_name in changes.get("serve", {}):
            if field_name in ServeConfig.model_fields and field_name not in PER_MODEL:
                raise ValueError(
                    f"serve.models.{name}.serve.{field_name} is the same for all models; set "
                    f"serve.{field_name}"
                )
    if serve.models and serve.model_name not in (ANY_NAME, *serve.models):
        raise ValueError(
            f"serve.model_name={serve.model_name} is none of serve.models, which are "
            f"{', '.join(serve.models)}; name one of them, or leave it out"
        )
    if serve.most_replicas < serve.replicas:
        raise ValueError(
            f"serve.max_replicas={serve.max_replicas} is below serve.replicas={serve.replicas}; "
            "raise it, or leave it out"
        )
