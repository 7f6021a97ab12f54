"""Load exported heads with the loading code of the packages that they are for.

    pip download --no-deps sglang==0.5.23 specforge==0.2.0 speculators==0.9.0   # unzip each
    git clone https://github.com/SafeAILab/EAGLE
    python -m tests.engines.check_packages --sglang <folder with sglang/> \\
        --specforge <folder with specforge/> --speculators <folder with speculators/> \\
        --eagle <folder with eagle/>

For each, heads of random weights are exported. SpecForge, speculators and EAGLE run as they are,
on CPU, and their logits must be Aerie's (speculators wants its repository's `hs_connectors/src`
on PYTHONPATH too). SGLang does not import without a GPU: of it the functions
that load weights are taken out of its files as they stand, and run over stand-ins for its
parameters. Every tensor must land in exactly one parameter, and every parameter be filled, except
the embedding and output head that an engine takes from the target.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from core.config import DRAFT_CONFIGS
from core.draft.base import DraftHead, TargetGeometry, build_head
from core.draft.export import export_head
from core.draft.formats import ExportTarget
from core.draft.formats.files import HeadFolder
from core.draft.vocabulary import DraftVocabulary

VOCAB, HIDDEN, DRAFT, TOKENS = 259, 32, 64, 7
GEOMETRY = TargetGeometry(VOCAB, HIDDEN, 64, 4, 2, 8, 1e-5, 500000.0, 2048)
TARGET = ExportTarget("some/target", ("LlamaForCausalLM",), GEOMETRY, 12)


def random_head(kind: str, size: int = DRAFT, **settings: Any) -> DraftHead:
    """A head with norms that are not all ones, so that none can be mistaken for another."""
    counts_V = torch.arange(VOCAB) * 7919 % VOCAB
    vocabulary = DraftVocabulary.from_counts(counts_V, size)
    config = DRAFT_CONFIGS[kind].model_validate({"vocab_size": size, **settings})
    head = build_head(config, GEOMETRY, vocabulary, seed=5)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(torch.rand(parameter.shape, generator=draw) + 0.5)
    return head


def inputs(layers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embedding, output head, features [T, L, H] and next tokens."""
    draw = torch.Generator().manual_seed(7)
    embedding_VH = torch.randn(VOCAB, HIDDEN, generator=draw)
    output_VH = torch.randn(VOCAB, HIDDEN, generator=draw)
    features_TLH = torch.randn(TOKENS, layers, HIDDEN, generator=draw)
    return embedding_VH, output_VH, features_TLH, torch.randint(VOCAB, (TOKENS,), generator=draw)


def aeries_logits(head: DraftHead) -> Tensor:
    """After all of `inputs`."""
    embedding_VH, output_VH, features_TLH, ids_T = inputs(4)
    head.attach_target(embedding_VH, output_VH)
    with torch.inference_mode():
        return head.extend(head.new_cache(TOKENS), features_TLH, ids_T).logits_KW[-1]


def exported(head: DraftHead, name: str) -> HeadFolder:
    """Its folder in a format, gone at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="aerie-export-")) / "head"
    export_head(folder, head, TARGET, name, "same")
    return HeadFolder(folder)


# SGLang


class Parameter:
    """Stands for one of SGLang's: keeps which tensors were loaded into it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.loaded: list[tuple[Tensor, Any]] = []

    def weight_loader(self, parameter: Parameter, tensor: Tensor, shard: Any = None) -> None:
        """As SGLang's layers have it; of fused ones `shard` says which part."""
        assert parameter is self and tensor.shape[1:] == self.shape[1:]
        self.loaded.append((tensor, shard))

    @property
    def is_full(self) -> bool:
        """Whether the loaded rows are all its rows, each part once."""
        parts = [shard for _, shard in self.loaded]
        rows = sum(tensor.shape[0] for tensor, _ in self.loaded)
        return rows == self.shape[0] and len(set(parts)) == len(parts)


def sglang_parameters(kind: str) -> dict[str, Parameter]:
    """What the constructors of `LlamaForCausalLMEagle` and `…Eagle3` make."""
    fused = HIDDEN if kind == "eagle1" else 2 * HIDDEN
    layer = {
        "self_attn.qkv_proj.weight": (8 * (4 + 2 + 2), fused),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_up_proj.weight": (2 * 64, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, 64),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    shapes = {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    if kind == "eagle1":
        shapes |= {"model.fc.weight": (HIDDEN, 2 * HIDDEN), "model.fc.bias": (HIDDEN,)}
    else:
        norms = ("layers.0.hidden_norm", "layers.0.input_layernorm", "norm")
        shapes |= {f"model.{name}.weight": (HIDDEN,) for name in norms}
        shapes |= {"model.fc.weight": (HIDDEN, 3 * HIDDEN), "lm_head.weight": (DRAFT, HIDDEN)}
    return {name: Parameter(shape) for name, shape in shapes.items()}


def method(file: Path, cls: str, name: str) -> str:
    """The source of a method as it stands in a file."""
    text = file.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == name:
                    lines = text.splitlines()[inner.lineno - 1 : inner.end_lineno]
                    return "\n".join(lines)
    raise LookupError(f"{file}: no {cls}.{name}; another version of SGLang?")


def sglang_loader(package: Path, kind: str) -> type:
    """A class with SGLang's own loading methods and nothing else."""
    models = package / "sglang" / "srt" / "models"
    scope: dict[str, Any] = {
        "torch": torch,
        "Iterable": Iterable,
        "Tuple": tuple,
        "get_layer_id": lambda name: 0 if ".layers.0." in name else None,
        "default_weight_loader": lambda parameter, tensor: parameter.weight_loader(
            parameter, tensor
        ),
    }
    plain = method(models / "llama.py", "LlamaForCausalLM", "_legacy_load_weights")
    plain = plain.replace("_legacy_load_weights", "load_weights", 1)
    file, cls = {
        "eagle1": ("llama_eagle.py", "LlamaForCausalLMEagle"),
        "eagle3": ("llama_eagle3.py", "LlamaForCausalLMEagle3"),
    }[kind]
    own = method(models / file, cls, "load_weights")
    exec(f"class Base:\n{plain}\n\nclass Loader(Base):\n{own}\n", scope)
    loader: type = scope["Loader"]
    return loader


def check_sglang(package: Path) -> Iterator[str]:
    """Weights of both kinds through SGLang's own loading methods."""
    for kind in ("eagle1", "eagle3"):
        head = random_head(kind)
        folder = exported(head, "sglang")
        parameters = sglang_parameters(kind)
        loader = sglang_loader(package, kind)()
        loader.named_parameters = parameters.items
        loader.model = SimpleNamespace()
        loader.config = SimpleNamespace(tie_word_embeddings=False)
        loader.hot_token_id = None
        tensors = dict(folder.tensors)
        loader.load_weights(iter(tensors.items()))
        empty = [name for name, parameter in parameters.items() if not parameter.is_full]
        assert not empty, f"not filled: {empty}"
        landed = [id(tensor) for p in parameters.values() for tensor, _ in p.loaded]
        tables = {"d2t", "t2d"} & set(tensors)
        lost = [n for n, t in tensors.items() if landed.count(id(t)) != 1 and n not in tables]
        assert not lost, f"not loaded: {lost}"
        ids_W = loader.hot_token_id if kind == "eagle3" else folder.token_map_W
        assert ids_W is not None and torch.equal(ids_W, head.vocabulary.d2t_W), "draft vocabulary"
        yield (
            f"{kind}: {len(landed)} of {len(tensors) - len(tables)} weights into "
            f"{len(parameters)} parameters, all full; {len(ids_W)} draft tokens"
        )


# The packages that run


def check_specforge(package: Path) -> Iterator[str]:
    """SpecForge's own check of a serving state, and its model with the exported weights."""
    sys.path.insert(0, str(package))
    to_sglang = importlib.import_module("specforge.export.to_sglang")
    draft = importlib.import_module("specforge.modeling.draft.llama3_eagle")
    head = random_head("eagle3")
    folder = exported(head, "sglang")
    state = to_sglang._serving_state(folder.tensors, to_sglang.WEIGHT_MAPS[_class(folder)])
    assert set(state) == set(folder.tensors)
    # Not by `from_pretrained`: transformers 5 leaves its tables of rotary positions unmade.
    model = draft.LlamaForCausalLMEagle3(LlamaConfig.from_pretrained(folder.path))
    info = model.load_state_dict(state, strict=False)
    assert info.missing_keys == ["embed_tokens.weight"], info.missing_keys
    assert not info.unexpected_keys, info.unexpected_keys
    embedding_VH, _, features_TLH, ids_T = inputs(4)
    with torch.inference_mode():
        states = features_TLH[None, :, :3].flatten(2)
        hidden = model(hidden_states=states, inputs_embeds=embedding_VH[ids_T][None])
        logits_W = model.lm_head(hidden)[0, -1]
    yield _agree("eagle3", logits_W, aeries_logits(head), f"{len(state)} tensors, none left over")


def check_speculators(package: Path) -> Iterator[str]:
    """The library's draft model with the exported weights."""
    sys.path.insert(0, str(package))
    library = importlib.import_module("speculators")
    for before in (False, True):
        head = random_head("eagle3", norm_before_residual=before)
        folder = exported(head, "speculators")
        config = library.SpeculatorModelConfig.from_pretrained(folder.path)
        config.speculators_config.verifier.name_or_path = None
        config.transformer_layer_config._attn_implementation = "eager"
        config.eagle_aux_hidden_state_layer_ids = [2, 6, 9]
        model = library.Eagle3DraftModel(config)
        given = folder.tensors
        info = model.load_state_dict(given, strict=False)
        assert not info.unexpected_keys, info.unexpected_keys
        from_target = {"embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
        assert set(info.missing_keys) == from_target, info.missing_keys
        embedding_VH, _, features_TLH, ids_T = inputs(4)
        model.embed_tokens.weight.data.copy_(embedding_VH)
        kept: list[Tensor] = []
        model.lm_head.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out))
        with torch.inference_mode():
            model(
                hidden_states=features_TLH[None, :, :3].flatten(2),
                input_ids=ids_T[None],
                document_ids=torch.zeros(1, TOKENS, dtype=torch.long),
                ttt_steps=1,
            )
        what = f"{len(given)} tensors, none left over, norm_before_residual {before}"
        yield _agree("eagle3", kept[0][0, -1], aeries_logits(head), what)


def check_eagle(package: Path) -> Iterator[str]:
    """The papers' own modules with the exported weights."""
    sys.path.insert(0, str(package))
    configs = importlib.import_module("eagle.model.configs")
    embedding_VH, output_VH, features_TLH, ids_T = inputs(4)
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("eagle1", "cnets1", {"bias": False}),
        ("eagle1", "cnets1", {"bias": True}),
        ("eagle3", "cnets", {}),
    ]
    for kind, module, settings in cases:
        head = random_head(kind, 0 if kind == "eagle1" else DRAFT, **settings)
        folder = exported(head, "eagle")
        said = json.loads((folder.path / "config.json").read_text())
        config = configs.EConfig.from_pretrained(folder.path / "config.json")
        # transformers 5, which the code is older than, fills the one in and hides the other.
        config.rope_scaling, config.rope_theta = None, said["rope_theta"]
        model = importlib.import_module(f"eagle.model.{module}").Model(config, bias=said["bias"])
        info = model.load_state_dict(folder.tensors, strict=False)
        assert not info.unexpected_keys, info.unexpected_keys
        assert set(info.missing_keys) == {"embed_tokens.weight"}, info.missing_keys
        model.embed_tokens.weight.data.copy_(embedding_VH)
        model.init_tree()
        model.reset()
        model.gradient_checkpointing = False
        states = features_TLH[:, -1] if kind == "eagle1" else features_TLH[:, :3].flatten(1)
        with torch.inference_mode():
            hidden = model(states[None], input_ids=ids_T[None])[0, -1]
            logits = output_VH @ hidden if kind == "eagle1" else model.lm_head(model.norm(hidden))
        what = f"{len(folder.tensors)} tensors, none left over {settings or ''}".rstrip()
        yield _agree(kind, logits, aeries_logits(head), what)


def _class(folder: HeadFolder) -> str:
    (name,) = folder.architectures
    return name


def _agree(kind: str, theirs: Tensor, ours: Tensor, what: str) -> str:
    difference = (theirs.float() - ours).abs().max().item()
    assert ours.std() > 0.1 and difference < 1e-4, f"logits differ by {difference}"
    return f"{kind}: {what}; logits differ by {difference:.1e}"


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "sglang": check_sglang,
    "specforge": check_specforge,
    "speculators": check_speculators,
    "eagle": check_eagle,
}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in CHECKS:
        parser.add_argument(f"--{name}", type=Path, help=f"folder that holds {name}")
    given = {name: path for name, path in vars(parser.parse_args()).items() if path}
    if not given:
        parser.error("name at least one package's folder")
    for name, path in given.items():
        for line in CHECKS[name](path.absolute()):
            print(f"{name:>11} {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
