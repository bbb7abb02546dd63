"""`rlhf chat`: talk to a model in the terminal.

With standard input piped, every line is a message or a command, answers go to standard output without colours and
everything else to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

from rlhf_pipeline import runtime
from rlhf_pipeline.config.stages import ChatConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.conversation import Conversation
from rlhf_pipeline.generation.load import content_hash, open_renderer
from rlhf_pipeline.models.ready import open_model

HELP = """\
/reset          begin again; the system message stays
/system <text>  set the system message; without a text, remove it
/undo           forget the last question and its answer
/retry          answer the last question in another way
/save <file>    append the conversation to a JSON Lines file that rlhf sft reads
/help           this list
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer; what was said of it stays. A line that begins with a space is a message, never a command."""


def main(config: ChatConfig) -> None:
    """Talk until the end of the input.

    Raises:
        UserError: for a model or tokenizer that cannot be used.
    """
    if runtime.world_size() > 1:
        raise UserError("rlhf chat: is for one process; start it without rlhf launch")
    process = runtime.start(config.runtime)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
    renderer = open_renderer(config.model, config.tokenizer)
    content_hash(config.model)  # a damaged artifact, or one that is no policy, is told here
    model = open_model(config.model, renderer.tokenizer, process.device)
    conversation = Conversation(model, renderer, config.sampling, seed=config.seed)
    conversation.system = config.system
    screen = Screen()
    screen.note(f"{config.model.path}; /help lists commands, Ctrl-D ends")
    for line in lines(screen):
        try:
            if not turn(line, conversation, screen):
                return
        except UserError as error:
            screen.note(str(error))


def lines(screen: Screen) -> Iterator[str]:
    """What is typed or piped, without blank lines."""
    while True:
        try:
            line = screen.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not screen.terminal:
                raise SystemExit(130) from None
            screen.note("Ctrl-D or /exit leaves")
            continue
        if line.strip():
            yield line


def turn(line: str, conversation: Conversation, screen: Screen) -> bool:
    """Do what one line asks for; false to leave."""
    if not line.startswith("/"):
        answer(conversation.ask(line.strip()), conversation, screen)
        return True
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    match command:
        case "/exit":
            return False
        case "/help":
            screen.note(HELP)
        case "/reset":
            conversation.reset()
            screen.note("forgotten")
        case "/system":
            conversation.system = rest or None
            screen.note("the system message is set" if rest else "no system message")
        case "/undo":
            conversation.undo()
            screen.note(f"{len(conversation.messages)} messages are left")
        case "/retry":
            answer(conversation.retry(), conversation, screen)
        case "/save":
            save(conversation, rest)
            screen.note(f"saved in {rest}")
        case _:
            screen.note(f"{command}: no such command; /help lists them")
    return True


def answer(pieces: Generator[str, None, None], conversation: Conversation, screen: Screen) -> None:
    """Show an answer as it comes; Ctrl-C ends it."""
    told = False
    with closing(pieces):  # its end keeps what was said
        try:
            for piece in pieces:
                if conversation.left_out and not told:
                    screen.note(f"the context is full: the {conversation.left_out} oldest messages are left out")
                told = True
                screen.write(piece)
        except KeyboardInterrupt:
            screen.write(" ...")
    if not told:
        screen.note("the model answers nothing; the question is not kept")
    screen.write("\n")


def save(conversation: Conversation, file: str) -> None:
    """Append the conversation to a file.

    Raises:
        UserError: when there is none, or it cannot be written.
    """
    if not file:
        raise UserError("/save: to which file?")
    line = json.dumps(conversation.row(), ensure_ascii=False) + "\n"
    try:
        with Path(file).expanduser().open("a", encoding="utf-8") as sink:
            sink.write(line)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error


class Screen:
    """The terminal, or two plain streams."""

    def __init__(self) -> None:
        from rich.console import Console

        self.terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.console = Console(stderr=not self.terminal, highlight=False, markup=False, soft_wrap=True)
        if self.terminal:
            import readline  # noqa: F401  # input() then has a history and can be edited

    def read(self) -> str:
        """The next line. EOFError at the end."""
        if self.terminal:
            return input("> ")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def write(self, text: str) -> None:
        """Text of the model; what would steer the terminal is shown as it is spelled."""
        text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A word of the program's own."""
        if self.terminal:
            self.console.print(text, style="dim")
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
