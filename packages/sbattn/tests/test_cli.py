"""How `sbattn-repro` ends when it cannot go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from sbattn import cli

pytest.importorskip("tyro")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mqrar", "--steps", "0"], "sbattn-repro: steps: expected at least 1, got 0"),
        (["bytelm", "--text", "/nowhere/text"], "sbattn-repro: .*/nowhere/text"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sbattn-repro", *words])
    with pytest.raises(SystemExit, match=message):
        cli.main()


def test_an_interrupted_run_keeps_its_checkpoint_and_ends_as_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def command(out: Path) -> list[str]:
        return ["sbattn-repro", "mqrar", "--steps", "50", "--length", "16", "--lengths", "16",
                "--out", str(out)]  # fmt: skip

    monkeypatch.setattr(sys, "argv", command(whole))
    cli.main()
    expected = capsys.readouterr().out

    ended = threading.Event()

    def interrupt_after_the_first_checkpoint() -> None:
        while not (broken / "checkpoint.pt").exists():
            if ended.wait(0.001):
                return
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt_after_the_first_checkpoint)
    monkeypatch.setattr(sys, "argv", command(broken))
    # Shells start what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher.start()
    try:
        with pytest.raises(SystemExit, match="goes on from its checkpoint"):
            cli.main()
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGINT, before)
    state = torch.load(broken / "checkpoint.pt", weights_only=True)
    assert 20 <= len(state["losses"]) < 50
    capsys.readouterr()
    cli.main()
    assert capsys.readouterr().out == expected
