"""The target model: the LLM whose output is kept.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.config import TargetConfig
from core.config.sections import TemplateName
from core.data.chat_templates import AUTO, use_template
from core.errors import ConfigError, InputError
from core.models.fused import FusedDecoder, RowBuffers
from core.models.packed import pack_linears
from core.models.ragged import RaggedBatch
from core.models.weights import load_causal_lm
from core.provenance import fingerprint, fingerprint_of, hash_json

WEIGHT_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# What transformers writes of itself into config.json, and what counts in its place: the release
# that the first heads' targets were saved by, so that the fingerprints those heads carry hold.
SAVED_BY = re.compile(rb'"transformers_version": "[^"]*"')
SAVED_BY_FIRST = b'"transformers_version": "5.23.0"'


@dataclass
class Target:
    """A target model ready for inference."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    eos_token_ids: frozenset[int]
    # Of the model below its adapters, where it has any.
    base_fingerprint: str | None = None
    # Computes what the model does over a cache of rows, where it can.
    fused: FusedDecoder | None = None

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        """V: rows of the embedding, which may be more than the tokenizer has tokens."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def max_position(self) -> int:
        """Longest sequence that the model's positions allow, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @torch.inference_mode()
    def features(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm [B, T, H]; no logits are computed.

        Equals HF's `hidden_states[-1]`.
        """
        (features,) = self.layer_features(input_ids_BT, attention_mask_BT, (self.num_layers,))
        return features

    @torch.inference_mode()
    def layer_features(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """The states [B, T, H] that enter some layers, from one pass; no logits are computed.

        Args:
            input_ids_BT: int64 [B, T].
            attention_mask_BT: 1 for tokens, 0 for padding at the right; None without padding.
            layers: index into HF's `hidden_states` each; the number of layers stands for the
                final feature, after the final norm. No other states are kept.
        """
        body = cast(Any, self.model.base_model)
        entering: dict[int, Tensor] = {}
        with _kept(decoder_layers(self.model), layers, entering):
            output = body(
                input_ids=input_ids_BT.to(self.device),
                attention_mask=None
                if attention_mask_BT is None
                else attention_mask_BT.to(self.device),
                use_cache=False,
            )
        entering[self.num_layers] = output.last_hidden_state
        return [entering[layer] for layer in layers]

    @torch.inference_mode()
    def cached_features(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        cache: Cache,
        sees_TC: Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> Tensor:
        """Features [T, L, H] of T tokens appended to a cache; the final feature is the last of L.

        Args:
            input_ids_T: int64 [T].
            positions_T: int64 [T]; in a draft tree, nodes of one depth share a position.
            cache: grows by T rows.
            sees_TC: bool [T, C], C counting the new rows; None for ordinary causal attention.
            layers: as in `layer_features`, ending with the final feature; empty for that alone.
        """
        mask = None if sees_TC is None else sees_TC[None, None].to(self.device)
        return self._cached(input_ids_T, positions_T, cache, layers, attention_mask=mask)

    @torch.inference_mode()
    def ragged_features(
        self,
        input_ids_N: Tensor,
        positions_N: Tensor,
        cache: Cache,
        ragged: RaggedBatch,
        layers: Sequence[int] = (),
        *,
        dense_rows: int | None = None,
    ) -> Tensor:
        """Features [N, L, H] of new tokens of several sequences, as `cached_features` gives them.

        Args:
            input_ids_N: int64 [N], one sequence after the other.
            positions_N: int64 [N].
            cache: knows which of its rows they go to.
            ragged: what each sees of the cache; the model uses `use_ragged_attention`.
            layers: as in `cached_features`.
            dense_rows: rows of the cache, to attend by transformers' own code and a mask over
                all of them; None to attend to each sequence's own rows.
        """
        if dense_rows is not None:
            mask = ragged.dense_mask(dense_rows)[None, None].to(self.device)
            return self._cached(input_ids_N, positions_N, cache, layers, attention_mask=mask)
        if self.fused is not None:
            return self.fused(
                input_ids_N.to(self.device),
                positions_N.to(self.device),
                cast(RowBuffers, cache),
                ragged,
                layers or (self.num_layers,),
            )
        # Any mask of four dimensions is passed on as it is: none is built.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        return self._cached(
            input_ids_N, positions_N, cache, layers, attention_mask=mask, ragged=ragged
        )

    def _cached(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        cache: Cache,
        layers: Sequence[int],
        **attention: Any,
    ) -> Tensor:
        body = cast(Any, self.model.base_model)
        entering: dict[int, Tensor] = {}
        with _kept(decoder_layers(self.model), layers, entering):
            output = body(
                input_ids=input_ids_T[None].to(self.device),
                position_ids=positions_T[None].to(self.device),
                past_key_values=cache,
                use_cache=True,
                **attention,
            )
        final: Tensor = output.last_hidden_state
        # Layers may be on several devices.
        states = [entering[layer].to(final.device) for layer in layers[:-1]]
        return torch.stack((*states, final), dim=2)[0]

    @torch.inference_mode()
    def logits(self, hidden_TH: Tensor) -> Tensor:
        """The output head on final hidden states: [T, H] → [T, V]."""
        logits_TV: Tensor = cast(Any, self.model.get_output_embeddings())(hidden_TH)
        return logits_TV

    def check_output_head(self) -> None:
        """Make sure that `logits` is all that the model does after the final norm.

        Raises:
            InputError: the architecture scales or caps its logits, which would go unnoticed.
        """
        ids_1T = torch.arange(4, device=self.device)[None] % self.vocab_size
        with torch.inference_mode():
            whole = self.model(ids_1T, use_cache=False).logits[0].float()
        ours = self.logits(self.features(ids_1T)[0]).float()
        if not torch.allclose(whole, ours, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
            raise InputError(
                f"target.path: {type(self.model).__name__} changes its logits after the output "
                "head (a scale or a cap), which is not supported yet"
            )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, whatever their name: the outermost list of as many modules."""
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in cast(nn.Module, model.base_model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(
        f"target.path: {type(model).__name__} has no list of {count} layers to take features from"
    )


@contextmanager
def _kept(layers: nn.ModuleList, wanted: Sequence[int], kept: dict[int, Tensor]) -> Iterator[None]:
    """Keep what enters these layers while a pass runs."""

    def keep(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [
        layers[index].register_forward_pre_hook(keep(index), with_kwargs=True)
        for index in wanted
        if index < len(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def target_folder(path: str | None, *, field: str = "target.path") -> Path:
    """The local folder of a model given as a folder or as a hub id (downloaded if need be).

    Raises:
        ConfigError: no path.
        InputError: not a folder with a config.json, or the hub does not have or give it.
    """
    if not path:
        raise ConfigError(f"{field} is not set; give an HF folder or a hub id")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"{field}={path}: no config.json in that folder; is it an HF model?")
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise InputError(f"{field}={path}: no such folder ({folder.absolute()})")
    try:
        return Path(snapshot_download(path, allow_patterns=WEIGHT_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{field}={path}: neither a folder here nor to be had from the model hub "
            f"({type(error).__name__}); check the name, the network, or HF_TOKEN for gated models"
        ) from error


def target_location(path: str) -> str:
    """What another node is told of a target: a folder by its full path, a hub id as it is.

    Nodes need not share a cache of downloads, so each looks a hub id up for itself.
    """
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


def target_fingerprint(folder: Path) -> str:
    """Hash of the weights and the model's config; a tokenizer or a README changes nothing.

    Nor does which transformers saved it: a model that is converted anew is the same target.
    """
    config = folder / "config.json"
    hashes = {file.name: fingerprint(file) for file in folder.glob("*.safetensors")}
    hashes[config.name] = fingerprint_of(SAVED_BY.sub(SAVED_BY_FIRST, config.read_bytes()))
    return hash_json(hashes)


def load_tokenizer(folder: Path, template: TemplateName = AUTO) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder, with its own chat template or the named family's.

    Raises:
        InputError: it cannot be loaded.
        MismatchError: the template is made of tokens that it does not have.
    """
    try:
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise InputError(
            f"target.path={folder}: its tokenizer cannot be loaded ({error}); give a folder with "
            "the model's tokenizer files"
        ) from error
    use_template(tokenizer, template)
    return tokenizer


def load_target(config: TargetConfig, num_threads: int | None = None) -> Target:
    """Load a target for inference.

    Args:
        config: path, dtype, device, packing.
        num_threads: torch threads of this process on CPU; None leaves them.
    Raises:
        InputError: no model there, or a damaged one; of adapters, see `merged_target`.
    """
    folder = target_folder(config.path)
    if num_threads is not None:
        torch.set_num_threads(max(1, num_threads))
    device = _device(config)
    dtype = getattr(torch, config.dtype)
    quiet_transformers()
    if config.adapter is None:
        model = load_causal_lm(
            folder, dtype=dtype, attn_implementation="sdpa", **_placement(config, device)
        )
        own, base = target_fingerprint(folder), None
    else:
        # Which imports this module.
        from core.models.adapters import adapted_fingerprint, adapter_folder, merged_target

        adapter = adapter_folder(config)
        model = merged_target(folder, adapter, dtype, device)
        own, base = adapted_fingerprint(folder, adapter), target_fingerprint(folder)
    model.eval().requires_grad_(False)
    if config.device_map is not None:
        # Where the embedding is; accelerate moves what goes on to the next device.
        device = model.device
    fused = None
    if config.pack_linear and device.type == "cpu":
        pack_linears(model)
        fused = FusedDecoder.of(model)
    tokenizer = load_tokenizer(folder, config.template)
    return Target(
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        fingerprint=own,
        base_fingerprint=base,
        eos_token_ids=eos_token_ids(model.generation_config, model.config, tokenizer),
        fused=fused,
    )


def _placement(config: TargetConfig, device: torch.device) -> dict[str, Any]:
    """Where the weights go, and in what form, as `from_pretrained` wants it said."""
    if config.device_map is not None and device.type != "cuda":
        raise ConfigError(
            f"target.device_map={config.device_map} spreads a target over GPUs, and this process "
            "has none; set it to null, or features.gpus_per_replica to the GPUs of a replica"
        )
    placement: dict[str, Any] = {"device_map": config.device_map or {"": device}}
    if config.quantization == "int8":
        placement["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif config.quantization == "nf4":
        placement["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        )
    return placement


def quiet_transformers() -> None:
    """No progress bars for shards and no advice in a worker's log."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Saving a model imports DeepSpeed where it is installed, which otherwise warns of this choice.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It says for every layer and pass that int8 goes through float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _device(config: TargetConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("target.device=cuda, but torch sees no GPU in this process; use auto")
    return torch.device(config.device)


def eos_token_ids(
    generation: GenerationConfig | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> frozenset[int]:
    """All tokens that end a generation: those of both configs and the tokenizer's."""
    found: set[int] = set()
    for value in (
        getattr(generation, "eos_token_id", None),
        config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(value)
    return frozenset(found)
