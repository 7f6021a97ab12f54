"""Lion against the paper's algorithm, and the file that checkpoints are written into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from core.train.optimizers import Lion, Moments, optimizer_of
from core.train.tensor_file import float32_file


def test_lion_is_the_papers_algorithm() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size)) for size in ((4, 3), (5,))]
    wanted = [weight.detach().clone() for weight in weights]
    moments = [torch.zeros_like(weight) for weight in wanted]
    lr, (first, second), decay = 0.01, (0.9, 0.99), 0.1
    optimizer = Lion(weights, lr=lr, betas=(first, second), weight_decay=decay)
    assert Moments(optimizer).names == ("exp_avg",)
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


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_moments_of_8_bits_are_read_and_written(name: str) -> None:
    """What is read back is what was written, up to 8 bits; a small weight's is exact."""
    weights = [torch.nn.Parameter(torch.randn(size)) for size in ((64, 100), (7,))]
    optimizer = optimizer_of([{"params": weights, "weight_decay": 0.0}], name, 0.01, (0.9, 0.99))
    moments = Moments(optimizer)
    assert len(moments.names) == (2 if name == "adamw_8bit" else 1)
    for weight in weights:
        moments.begin(weight, optimizer.state[weight])
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    large, small = (optimizer.state[weight] for weight in weights)
    assert large["state1"].dtype == torch.uint8 and small["state1"].dtype == torch.float32
    for moment in moments.names:
        for weight, share in zip(weights, (0.02, 0.0), strict=True):
            state = optimizer.state[weight]
            value = moments.read(state, moment, weight).clone()
            assert value.shape == weight.shape and bool((value != 0).any())
            again = moments.read(state, moment, weight)
            torch.testing.assert_close(again, value, rtol=0, atol=share * float(value.abs().max()))
            moments.write(state, moment, 2 * value)
            torch.testing.assert_close(
                moments.read(state, moment, weight),
                2 * value,
                rtol=0,
                atol=2 * share * float(value.abs().max()),
            )


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
