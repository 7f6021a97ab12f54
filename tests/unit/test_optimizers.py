"""Lion against the paper's algorithm, and the file that checkpoints are written into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from core.train.optimizers import Lion, moments_of
from core.train.tensor_file import float32_file


def test_lion_is_the_papers_algorithm() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size)) for size in ((4, 3), (5,))]
    wanted = [weight.detach().clone() for weight in weights]
    moments = [torch.zeros_like(weight) for weight in wanted]
    lr, (first, second), decay = 0.01, (0.9, 0.99), 0.1
    optimizer = Lion(weights, lr=lr, betas=(first, second), weight_decay=decay)
    assert moments_of(optimizer) == ("exp_avg",)
    for _ in range(3):
        gradients = [torch.randn_like(weight) for weight in wanted]
        for number, gradient in enumerate(gradients):
            weights[number].grad = gradient
            step = (first * moments[number] + (1 - first) * gradient).sign()
            wanted[number] -= lr * (step + decay * wanted[number])
            moments[number] = second * moments[number] + (1 - second) * gradient
        optimizer.step()
    for weight, value, moment in zip(weights, wanted, moments, strict=True):
        torch.testing.assert_close(weight.data, value)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], moment)


def test_lion_leaves_weights_without_a_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=1.0).step()
    assert torch.equal(weight.data, torch.ones(2))


def test_a_file_written_tensor_by_tensor_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(5), "scalar": torch.tensor(2.5)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    path = tmp_path / "some.safetensors"
    with float32_file(path, shapes, {"step": "3"}) as write:
        for name, tensor in tensors.items():
            write(name, tensor.double())
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"step": "3"}


def test_other_tensors_than_announced_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"

    def write(names: tuple[str, ...]) -> None:
        with float32_file(path, {"a": (2,), "b": (3,)}, {}) as tell:
            for name in names:
                tell(name, torch.zeros(2))

    with pytest.raises(AssertionError, match="b"):
        write(("a", "b"))
    with pytest.raises(AssertionError, match="not all"):
        write(("a",))
