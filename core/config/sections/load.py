"""How a served model is put under load."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.config.base import Section, field, setting

Count = Annotated[int, Field(ge=1)]


class Phase(Section):
    """A part of a load profile."""

    seconds: float = field(30.0, "how long", gt=0)
    clients: int = field(1, "clients that ask one request after the other", ge=0)
    max_tokens: int = field(64, "tokens of each answer, at most", ge=1)


class LoadConfig(Section):
    """What load_test does to a server that it starts."""

    name: Literal["soak", "overload", "autoscaling", "comparison"] = field(
        "soak",
        "soak: the same load for long, with errors, memory, and answers held against plain "
        "decoding; overload: more requests than can be answered, and what comes of the others; "
        "autoscaling: a load profile, and how many replicas follow it; comparison: with and "
        "without draft head (and vLLM) side by side",
    )
    prompts: str | tuple[str, ...] | None = setting(
        None, "prompts as for eval.prompts, their first turns; null takes ShareGPT's questions"
    )
    max_prompt_characters: int = field(600, "longer prompts are left out", ge=1)
    clients: int = field(16, "clients that ask one request after the other", ge=1)
    seconds: float = field(600.0, "how long the load lasts; of overload, each part of it", gt=0)
    warm_up_s: float = field(60.0, "before that, the same load, of which nothing counts", ge=0)
    max_tokens: int = field(64, "tokens of each answer, at most", ge=1)
    sample: int = field(
        200, "soak: answers that are held against plain decoding, spread over all", ge=0
    )
    overload: float = field(5.0, "requests a second, in what the server can answer", gt=1)
    profile: tuple[Phase, ...] = field((), "autoscaling: the phases, one after the other")
    client_counts: tuple[Count, ...] = field((1, 4, 16), "comparison: so many clients in turn")
    repeats: int = field(1, "comparison: times that every server is measured, in turn", ge=1)
    vllm_python: str | None = setting(
        None, "comparison: the Python of an environment with vLLM, whose server is measured too"
    )
