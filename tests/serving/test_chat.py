"""`littlebit chat` in a process of its own, at a terminal and in a pipe."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import littlebit.fast as lb
import pytest
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.decoding.tokenizer import Tokenizer
from server import make_model

pytest.importorskip("prompt_toolkit", reason="the extra is not installed: pip install 'littlebit[chat]'")
COMMAND = [sys.executable, "-m", "littlebit.fast", "chat"]


@pytest.fixture(scope="module")
def local(chat_model):
    """What `littlebit generate` writes after a prompt that is already in the template."""
    model, tokenizer = map_model(chat_model), Tokenizer(chat_model)
    return lambda prompt, count, **more: lb.generate(model, prompt, count, tokenizer=tokenizer, **more)


def test_a_pipe_and_a_file_get_one_answer(chat_model, local, tmp_path):
    file = tmp_path / "question.txt"
    file.write_text("Hi\n")
    options = ["--max-new-tokens", "24", "--temperature", "0.8", "--seed", "3", "--min-p", "0.05", "--speed"]
    settings = {"temperature": 0.8, "seed": 3, "min_p": 0.05}
    expected = local("[system] Be brief.\n[user] Hi\n[assistant] ", 24, **settings)
    for more, given in ((["--file", str(file)], ""), ([], "Hi\n")):
        command = [*COMMAND, str(chat_model), *options, "--system", "Be brief.", *more]
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
        assert re.fullmatch(r"\[24 tokens, [\d.]+ tokens/s\]\n", done.stderr)
    done = subprocess.run([*COMMAND, str(chat_model)], input="", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "must hold a message" in done.stderr


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, command, folder):
        import pty

        self.mine, theirs = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "LITTLEBIT_CACHE": str(folder), "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, keys):
        os.write(self.mine, keys.encode())

    def wait(self, pattern):
        """Return what is shown up to the end of a pattern, and forget it."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            if select.select([self.mine], [], [], 0.2)[0]:
                text = os.read(self.mine, 65536).decode(errors="replace").replace("\r", "")
                self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before


def take_terminal():
    """Make standard input the process's controlling terminal, so that Ctrl-C reaches it.

    A program that a shell started in the background ignores Ctrl-C, and so do those that it starts.
    """
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
def test_a_conversation_at_a_terminal(local, tmp_path):
    """The answer is longer than a terminal holds (4 KB), so it waits for this test to read it, and can be stopped."""
    model = make_model(tmp_path / "model", positions=16384)
    beginning = re.escape(local("[user] Hi\n[assistant] ", 8, temperature=0.0).rstrip())
    options = ["--max-new-tokens", "16000", "--context", "16384", "--stop", "zzzz"]
    terminal = Terminal([*COMMAND, str(model), *options], tmp_path)
    try:
        terminal.wait("/help lists the commands")
        terminal.wait("> ")
        for _ in range(20):  # until Ctrl-C comes before the answer's end
            terminal.type("/clear\r")
            terminal.wait("forgotten")
            terminal.wait("> ")
            terminal.type("Hi\r")
            terminal.wait(beginning)  # the terminal now turns Ctrl-C into a signal
            terminal.type("\x03")  # stops the answer, not the program
            if "[stopped]" in terminal.wait("> "):
                break
        else:
            pytest.fail("no answer could be stopped")
        terminal.type("/save said.json\r")
        terminal.wait("2 messages are in said.json")
        terminal.type("/save said.json\r")
        terminal.wait("exists already")
        terminal.type("/system Be brief.\r")
        terminal.wait("begins again")
        terminal.type("/clear\r")
        terminal.wait("forgotten")
        terminal.type("/nothing\r")
        terminal.wait("no command is called /nothing")
        terminal.wait("> ")
        for _ in range(20):  # a key that comes before the prompt is lost
            terminal.type("\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                terminal.process.wait(3)
                break
        assert terminal.process.poll() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.mine)
    said = json.loads((tmp_path / "said.json").read_text())
    assert [each["role"] for each in said] == ["user", "assistant"]
    assert said[0]["content"] == "Hi"
    assert "Hi" in (tmp_path / "chat_history").read_text()
