"""Fine-tuning by transformers' model and torch's AdamW alone, one sequence at a time."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from core.data.example_dataset import ExampleDataset
from core.train.finetune import FinetuneTask
from core.train.schedule import learning_rate


def plain(task: FinetuneTask) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps and the last weights: one sequence at a time, by HF and torch alone."""
    train = task.config.train
    model = AutoModelForCausalLM.from_pretrained(task.target, dtype=torch.float32).train()
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=train.betas)
    source, losses = ExampleDataset(task.examples, "train"), []
    for step in range(task.order.total_steps):
        total, loss = 0, torch.zeros(())
        for row in task.order.global_batch(step):
            example = source[int(task.training.indices_N[row])]
            ids_T = torch.from_numpy(example.input_ids_T[: train.max_length].astype("int64"))
            mask_T = torch.from_numpy(example.loss_mask_T[: train.max_length].astype(bool))
            logits_TV = model(ids_T[None]).logits[0]
            picked = mask_T[1:]
            loss = loss + F.cross_entropy(
                logits_TV[:-1][picked], ids_T[1:][picked], reduction="sum"
            )
            total += int(picked.sum())
        optimizer.zero_grad()
        (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.order.total_steps, train)
        optimizer.step()
        losses.append(float(loss.detach()) / total)
    return losses, {name: p.detach() for name, p in named.items()}


def decided(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Without the biases of keys: softmax does not see them, so that their gradient is rounding
    alone, of which AdamW makes steps of full size."""
    if name.endswith("c_attn.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat((query, value))
    if name.endswith("query_key_value.bias"):
        return tensor.view(4, 3, -1)[:, [0, 2]]
    return tensor
