"""How a speculative decoder is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.config.base import Section, field, setting

Temperature = Annotated[float, Field(ge=0)]
TreeSize = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=0, le=16)]


class EvalConfig(Section):
    """What evaluate_draft measures."""

    prompts: str | tuple[str, ...] | None = setting(
        None,
        "prompts, or a list of such files: JSONL of id, task, messages; of question_id, category, "
        "turns (MT-bench, Spec-Bench); or of plain prompts",
    )
    tasks: tuple[str, ...] | None = field(
        None, "take prompts of these tasks alone, as reports name them; null takes all"
    )
    max_prompts: int | None = field(
        None, "take at most so many prompts, spread over tasks; null takes all", ge=1
    )
    turns: int | None = field(
        None,
        "turns asked of a prompt that has several, each on top of the target's own answers; null "
        "asks all",
        ge=1,
    )
    max_new_tokens: int = field(64, "tokens generated a prompt", ge=1)
    temperatures: tuple[Temperature, ...] = field(
        (0.0,),
        "temperatures of decoding, each measured on all prompts; the first one's figures come "
        "first in reports, 0 is greedy; decode.top_p and the like hold at all of them",
        min_length=1,
    )
    seed: int = field(0, "of what is drawn at temperatures above 0", ge=0)
    repeats: int = field(
        1,
        "times that every way answers each prompt, in turn; ratios are taken within a repeat, "
        "medians and intervals over repeats and prompts",
        ge=1,
    )
    fixed_total_tokens: tuple[TreeSize, ...] = field(
        (60,), "tree sizes measured beside decode.total_tokens"
    )
    fixed_depths: tuple[Depth, ...] = field(
        (), "depths that each of these sizes is measured with; none of all takes decode.depth"
    )
    ngram_total_tokens: int = field(
        12,
        "tree size of copying alone, which is measured where decode.ngram_match is set; so is the "
        "chosen tree without copies",
        ge=2,
    )
    untrained_prompts: int = field(
        4, "prompts on which an untrained head's accepted length is measured", ge=0
    )
    hf_generate_prompts: int = field(
        4, "prompts on which HF generate is timed as a second baseline", ge=0
    )
    hf_lookup_tokens: int = field(
        0,
        "prompt_lookup_num_tokens of HF's prompt lookup, which is timed on the same prompts; 0 "
        "leaves it out",
        ge=0,
    )
    hf_model: Literal["plain", "packed"] = field(
        "plain",
        "what HF generates with: plain is the model as transformers loads it (a second one in "
        "memory where target.pack_linear packs), packed the one that Aerie decodes with",
    )
    vllm_python: str | None = setting(
        None,
        "the Python of an environment with vLLM, on the node that evaluates: vLLM answers at "
        "temperature 0 too, plainly, drafting by copying, and drafting chains with draft.path; "
        "null leaves it out",
    )
    vllm_drafts: int = field(3, "tokens that vLLM drafts a round", ge=1)
    llama_cpp_python: str | None = setting(
        None,
        "the Python of an environment with llama-cpp-python, likewise; it needs llama_cpp_model",
    )
    llama_cpp_model: str | None = setting(
        None, "the target for llama.cpp: a GGUF file with weights of target.dtype"
    )
    batch_sizes: tuple[BatchSize, ...] = field(
        (),
        "requests at work at a time: at each of these, throughput is measured in a closed loop for "
        "plain decoding, the chosen tree and the fixed ones; none of all leaves it out",
    )
    arrivals: float = field(
        4.0,
        "at each of these batch sizes, mean rounds between two requests of one more run, which "
        "checks that answers stay the same when requests come at random; 0 leaves it out",
        ge=0,
    )
    num_replicas: int = field(
        1,
        "most processes that answer prompts; those that share a node's CPUs, or a GPU, leave speed "
        "out",
        ge=1,
    )
    cpus: float = field(2.0, "CPUs of the evaluating process; also its threads", gt=0)
    gpus: float = field(0.0, "GPUs of the evaluating process", ge=0)
