"""An HF causal language model as a row of layers that a DeepSpeed pipeline divides.

The whole model is on torch's meta device, which costs no memory. A stage asks for its own layers,
and only then are their weights read, one module at a time, by transformers' own loader, which
knows how checkpoints name and lay out an architecture's weights. The layers are the model's own
modules, so that a weight has its HF name wherever it is (`ModelStages.names`).

What goes from layer to layer, and from stage to stage, is a pair: hidden states, and positions as
integers. No layer has dropout: the modules are called in evaluation mode, or a run's result would
depend on its topology. Shapes: B rows, T tokens, H hidden, V vocabulary, S supervised tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from core.errors import ConfigError, InputError
from core.models.partition import BlockCost, estimate_cost
from core.models.stage_adapters import StageAdapters
from core.models.stage_families import StageFamily, family_of, final_norm, output_of
from core.models.stage_loss import StageLoss
from core.models.target import quiet_transformers
from core.models.weights import tensor_files

Pair = tuple[Tensor, Tensor]


class ModelStages:
    """A model in parts; see the module.

    Attributes:
        config: the model's.
        dtype: of its weights.
        device: where the parts of this worker go.
        family: where its parts are.
        skeleton: the model; on the meta device but for what has been built.
        num_layers: decoder layers.
        adapters: what freezes the weights and trains others beside them; None to train all.
        tied: whether the head's weights are the embedding's.
    """

    def __init__(
        self,
        source: Path | PretrainedConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        seed: int = 0,
        attention: str | None = None,
        adapters: StageAdapters | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            source: an HF folder, or a config, for random weights that depend on the seed alone.
            dtype: of the weights.
            device: CPU if None.
            seed: of random weights.
            attention: transformers' name of an implementation; None for its choice.
            adapters: see above.
        Raises:
            ConfigError: an architecture without a family, or adapters for no layer.
            InputError: not a causal language model that transformers knows.
        """
        self.folder = source if isinstance(source, Path) else None
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self._seed, self.adapters = seed, adapters
        quiet_transformers()
        try:
            config = AutoConfig.from_pretrained(source) if isinstance(source, Path) else source
            family = family_of(config)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention
                )
        except ConfigError:
            raise
        except (ValueError, OSError) as error:
            raise InputError(
                f"{source}: not a causal language model that transformers knows ({error})"
            ) from error
        self.skeleton = cast(PreTrainedModel, model)
        self.config: PretrainedConfig = self.skeleton.config
        self.family: StageFamily = family(cast(PreTrainedModel, self.skeleton.base_model))
        self._head = cast(nn.Module, self.skeleton.get_output_embeddings())
        embedding = self._module(self.family.embedding)
        self.tied = self._head.weight is embedding.weight
        self.num_layers = len(self._layers)
        self._paths = {id(module): path for path, module in self.skeleton.named_modules()}
        if adapters is not None:
            adapters.check(self._layers[0])

    @property
    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self._module(self.family.layers))

    def _module(self, name: str) -> nn.Module:
        return cast(nn.Module, getattr(self.family.body, name))

    # What DeepSpeed is given

    def specs(self) -> list[Any]:
        """DeepSpeed's `LayerSpec`s: embedding, what else enters, layers, final norm, head."""
        # It wants to know the processes, which need not be there before.
        from deepspeed.pipe import LayerSpec, TiedLayerSpec

        embedding, head = LayerSpec(TokenEmbedding, self), LayerSpec(OutputHead, self)
        if self.tied and self.adapters is None:
            # One module that either end has for itself, whose gradients are added up.
            tied = {"tied_weight_attr": ["module.weight"]}
            embedding = TiedLayerSpec("embedding", TokenEmbedding, self, **tied)
            head = TiedLayerSpec("embedding", TokenEmbedding, self, forward_fn=_pass_on, **tied)
        entry = [LayerSpec(Entry, self)] if self.family.entry else []
        layers = [LayerSpec(DecoderLayer, self, index) for index in range(self.num_layers)]
        return [embedding, *entry, *layers, LayerSpec(FinalNorm, self), head]

    def spec_bounds(self, bounds: Sequence[int]) -> list[int]:
        """Bounds of stages in `specs`, from those in blocks (`core.models.partition`)."""
        before = 1 if self.family.entry else 0
        last = self.num_layers + 2
        return [0 if b == 0 else b + before + (1 if b == last else 0) for b in bounds]

    def loss(self) -> StageLoss:
        """For the stage with the head."""
        return StageLoss(self._head)

    # Weights

    def build(self, *modules: nn.Module) -> None:
        """Give modules of the skeleton their weights.

        Raises:
            InputError: no safetensors files, damaged ones, or weights missing in them.
        """
        prefixes = tuple(f"{self._paths[id(module)]}." for module in modules)
        if self.folder is None:
            for module, prefix in zip(modules, prefixes, strict=True):
                self._draw(module, prefix)
        else:
            self._load(prefixes)
        if self.tied:
            self._head.weight = self._module(self.family.embedding).weight
        self.family.ready(self.device)
        if self.adapters is not None:
            for module in modules:
                self.adapters.freeze(module)
        missing = [
            f"{prefix}{name}"
            for module, prefix in zip(modules, prefixes, strict=True)
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
            if tensor.is_meta
        ]
        if missing:
            raise InputError(
                f"{self.folder}: its safetensors files lack {len(missing)} weights of "
                f"{type(self.skeleton).__name__}, among them {missing[0]}; give a whole checkpoint"
            )

    def build_layer(self, index: int) -> tuple[str, nn.Module]:
        """A decoder layer with its weights, and adapters where there are some; and its path."""
        layer = self._layers[index]
        path = self._paths[id(layer)]
        self.build(layer)
        if self.adapters is not None:
            self.adapters.adapt(layer, path, self.device)
        return path, layer

    def drop_layer(self, index: int) -> None:
        """Forget a layer that has been built, and is not to be again."""
        self._layers[index] = nn.Identity()

    def read_block(self, number: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Weights of the first or the last block (`block_names`), which are dropped again."""
        if number == 0:
            entry = [self._module(name) for name in self.family.entry]
            modules = [self._module(self.family.embedding), *entry]
        else:
            modules = [final_norm(self.family), *([] if self.tied else [self._head])]
        self.build(*modules)
        built = dict(self.skeleton.named_parameters())
        found = {name: built[name].detach() for name in names}
        for module in modules:
            module.to("meta")
        return found

    def names(self) -> dict[str, nn.Parameter]:
        """HF name → weight, of what has been built here; a tied one has the embedding's name.

        With adapters, names as they are in a model that peft has wrapped.
        """
        before = "" if self.adapters is None else self.adapters.prefix
        named = self.skeleton.named_parameters()
        return {f"{before}{name}": parameter for name, parameter in named if not parameter.is_meta}

    def shapes(self) -> dict[str, torch.Size]:
        """HF name → shape of all weights of the model, in its order."""
        return {name: parameter.shape for name, parameter in self.skeleton.named_parameters()}

    def block_names(self) -> list[list[str]]:
        """Names of the weights of each block, in order; a tied one is the embedding's."""
        entry = [self._module(name) for name in self.family.entry]
        blocks = [[self._module(self.family.embedding), *entry]]
        blocks += [[layer] for layer in self._layers]
        blocks += [[final_norm(self.family), self._head]]
        prefixes = [tuple(f"{self._paths[id(m)]}." for m in modules) for modules in blocks]
        return [[name for name in self.shapes() if name.startswith(p)] for p in prefixes]

    def _draw(self, module: nn.Module, prefix: str) -> None:
        """Random weights; those of a module are the same wherever it is."""
        place = list(self._paths.values()).index(prefix.removesuffix("."))
        module.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed * len(self._paths) + place)
            module.apply(self.skeleton._init_weights)
        module.to(self.device)

    def _load(self, prefixes: tuple[str, ...]) -> None:
        assert self.folder is not None
        model = self.skeleton
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = model.state_dict()
        prefix = model.base_model_prefix
        files: dict[Path, list[str]] = {}
        for name, file in tensor_files(self.folder).items():
            target, _ = rename_source_key(name, renamings, converters, prefix, known)
            if target.startswith(prefixes):
                files.setdefault(file, []).append(name)
        with ExitStack() as stack:
            slices = {}
            try:
                for file, names in files.items():
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                    slices.update({name: opened.get_slice(name) for name in names})
                found, _ = convert_and_load_state_dict_in_model(
                    model,
                    slices,
                    LoadStateDictConfig(
                        weight_mapping=mapping, dtype=self.dtype, device_map={"": self.device}
                    ),
                )
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{self.folder}: its weights cannot be read ({error}); copy the folder anew"
                ) from error
        # What maps these weights is not what maps all of them when they are saved.
        del model._weight_conversions
        wrong = [*found.mismatched_keys, *found.conversion_errors]
        if wrong:
            raise InputError(
                f"{self.folder}: weights do not fit its config.json: {wrong[0]}; give a folder "
                "whose files belong together"
            )

    # Cost

    def costs(
        self, *, rows: int, tokens: int, state_bytes: int = 16, recompute: bool = False
    ) -> list[BlockCost]:
        """Estimated costs of the blocks, for `core.models.partition.balance`.

        Args:
            rows: of a micro-batch.
            tokens: of each of them.
            state_bytes: a weight's, its gradient's and its optimizer's together.
            recompute: whether a layer keeps its input alone for the backward pass.
        """
        config, width = self.config, self.dtype.itemsize
        hidden = int(config.hidden_size)
        # Of a layer, as a multiple of its input: what products and norms keep, roughly.
        kept = 1 if recompute else 16
        passed = float(rows * tokens * hidden * width)
        attention = 2.0 * 2 * tokens * hidden / 2
        costs = []
        shapes = self.shapes()
        names = ["embedding", *[f"layer {i}" for i in range(self.num_layers)], "head"]
        for number, (name, weights) in enumerate(zip(names, self.block_names(), strict=True)):
            size = sum(shapes[weight].numel() for weight in weights)
            is_layer = 0 < number <= self.num_layers
            active = 0 if number == 0 else sum(self._active(w, shapes[w]) for w in weights)
            if number > self.num_layers and self.tied:
                active += int(cast(Tensor, self._head.weight).numel())
            costs.append(
                estimate_cost(
                    name,
                    trained=size,
                    active=active,
                    held_bytes=float(size * state_bytes),
                    pass_bytes=passed * (kept if is_layer else 1),
                    tokens=rows * tokens,
                    attention=attention if is_layer else 0.0,
                )
            )
        return costs

    def tied_bytes(self, state_bytes: int = 16) -> float:
        """What a second copy of the embedding takes where the head is on another stage."""
        return float(cast(Tensor, self._head.weight).numel() * state_bytes) if self.tied else 0.0

    def _active(self, name: str, shape: torch.Size) -> int:
        """Of experts, stacked in three dimensions, each token is sent to some."""
        experts = getattr(self.config, "num_local_experts", None)
        if experts and len(shape) == 3 and shape[0] == experts:
            return shape.numel() * int(self.config.num_experts_per_tok) // int(experts)
        return shape.numel()


class TokenEmbedding(nn.Module):
    """Tokens and positions → hidden states and positions."""

    def __init__(self, stages: ModelStages) -> None:
        super().__init__()
        self.module = stages._module(stages.family.embedding)
        stages.build(self.module)

    def forward(self, inputs: Pair) -> Pair:
        """[B, T] → [B, T, H]."""
        hidden_BTH: Tensor = self.module(inputs[0])
        if torch.is_grad_enabled() and not hidden_BTH.requires_grad:
            # A frozen embedding: what is behind it wants a gradient all the same.
            hidden_BTH.requires_grad_()
        return hidden_BTH, inputs[1]


class Entry(nn.Module):
    """What an architecture has between the embedding and the first layer."""

    def __init__(self, stages: ModelStages) -> None:
        super().__init__()
        self._family = stages.family
        self.parts = nn.ModuleList([stages._module(name) for name in stages.family.entry])
        stages.build(*self.parts)

    def forward(self, inputs: Pair) -> Pair:
        """[B, T, H] → [B, T, H]."""
        return self._family.enter(*inputs), inputs[1]


class DecoderLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, stages: ModelStages, index: int) -> None:
        super().__init__()
        self._family, self._index = stages.family, index
        _, self.module = stages.build_layer(index)

    def forward(self, inputs: Pair) -> Pair:
        """[B, T, H] → [B, T, H]."""
        arguments = self._family.arguments(self._index, *inputs)
        return output_of(self.module(inputs[0], **arguments)), inputs[1]


class FinalNorm(nn.Module):
    """The norm before the head."""

    def __init__(self, stages: ModelStages) -> None:
        super().__init__()
        self.module = final_norm(stages.family)
        stages.build(self.module)

    def forward(self, inputs: Pair) -> Pair:
        """[B, T, H] → [B, T, H]."""
        return self.module(inputs[0]), inputs[1]


class OutputHead(nn.Module):
    """Has the head's weights; `StageLoss` multiplies by them, a few tokens at a time."""

    def __init__(self, stages: ModelStages) -> None:
        super().__init__()
        self.module = stages._head
        if not stages.tied:
            stages.build(self.module)
        elif self.module.weight.is_meta:
            # A frozen copy of the embedding, which is on another stage.
            stages.build(stages._module(stages.family.embedding))

    def forward(self, inputs: Pair) -> Pair:
        """Passes on what it gets."""
        return inputs


def _pass_on(_: nn.Module, inputs: Pair) -> Pair:
    return inputs
