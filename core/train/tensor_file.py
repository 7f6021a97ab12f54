"""Writing a safetensors file one tensor at a time, so that no more than one is in memory.

`safetensors.torch.save_file` wants all of them at once. Format: eight bytes with the length of a
JSON header, the header, then the tensors' bytes one after the other (huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from core.paths import naming_a_full_disk

ALIGNMENT = 8
ITEM_BYTES = 4


@contextmanager
def float32_file(
    path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Open a file for float32 tensors of these names and shapes.

    Args:
        path: to be written.
        shapes: of all tensors, in the order in which they will come.
        metadata: for the header.
    Yields:
        What takes a name and its tensor; asserts that they come as announced.
    Raises:
        ResourceError: the disk is full.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + ITEM_BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    coming = iter(shapes.items())
    with naming_a_full_disk(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def write(name: str, tensor: Tensor) -> None:
            expected, shape = next(coming)
            assert (name, tuple(tensor.shape)) == (expected, tuple(shape)), name
            array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            file.write(array.data)

        yield write
        assert next(coming, None) is None, "not all of the announced tensors came"
