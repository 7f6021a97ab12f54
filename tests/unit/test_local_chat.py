"""`aerie chat --model <folder>`: the model's own answers, in this process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from core.config import Config
from core.data.conversations import Message
from core.data.template import encode_prompt
from core.models.target import Target
from serve import chat
from serve.local_chat import LocalChat
from tests.tiny_targets import save_tiny


def test_answers_are_the_models_own_greedy_text(
    tiny_target_folder: Path, tiny_target: Target
) -> None:
    config = Config().replace(target={"path": str(tiny_target_folder), "dtype": "float32"})
    local = LocalChat(config, max_tokens=12)
    said: list[Message] = []
    for question in ("Hello!", "And then?"):
        answer = "".join(text for text, _ in local.ask(question))
        said.append(Message("user", question))
        prompt = encode_prompt(tiny_target.tokenizer, said)
        ids = tiny_target.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False
        )[0, len(prompt) :]
        assert answer == tiny_target.tokenizer.decode(ids, skip_special_tokens=True)
        said.append(Message("assistant", answer))
    assert [one["content"] for one in local.messages] == [message.content for message in said]
    assert local.figures["accepted_length"] == 1.0 and local.figures["rounds"] > 0


@pytest.mark.parametrize("flags", [[], ["--load-in-8bit"], ["--load-in-4bit"]])
def test_a_conversation_in_the_terminal(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n/stats\n/reset\n/quit\n"))
    # bitsandbytes' kernel wants layers of a multiple of 32 outputs.
    folder = save_tiny(
        tmp_path / "model", "llama", hidden_size=64, head_dim=16, intermediate_size=64
    )
    code = chat.main(["--model", str(folder), "--max-tokens", "4", *flags])
    printed = capsys.readouterr()
    shown = printed.out
    assert code == 0, printed.err
    assert "tokens/s, accepted length 1.00" in shown
    assert "forgotten" in shown


def test_what_cannot_be_talked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(["--model", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        chat.main(["--load-in-4bit"])
    assert ended.value.code == 2
    assert "go with --model" in capsys.readouterr().err
