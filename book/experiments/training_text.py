"""Write training texts in the form in which the trained model will meet them.

WikiText-2's training tokens become the text that perplexity is usually measured on: rows are joined by two newlines,
and the placeholders of unknown words are taken out. With --chat, dialogues become what a chat with SmolLM2 looks like
to the model, in its own chat template:

    python book/experiments/training_text.py wikitext2-train.txt.xz wikitext2-train.txt
    python book/experiments/training_text.py --chat dialogue-train.txt.xz chat.txt

A dialogue is a document, ended by two blank lines: rows that begin with "User: " and "Assistant: ", or a question, a
blank line and the answer.
"""

import argparse
import re
from pathlib import Path

from littlebit.fast import load_tokenizer
from littlebit.fast.checkpoints.texts import read_text

MODEL = "smollm2"
ROLES = {"User": "user", "Assistant": "assistant"}


def main() -> None:
    """Convert the file named first into the one named second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="UTF-8 text (.xz allowed)")
    parser.add_argument("target", type=Path)
    parser.add_argument("--chat", action="store_true", help="dialogues, in the chat template")
    arguments = parser.parse_args()
    text = read_text(arguments.source)
    if arguments.chat:
        tokenizer = load_tokenizer(MODEL)
        chats = [messages(document.strip()) for document in text.split("\n\n\n")]
        parts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats if len(chat) > 1]
        arguments.target.write_text("".join(parts), encoding="utf-8")
    else:
        arguments.target.write_text("\n\n".join(row(line) for line in text.split("\n")), encoding="utf-8")


def row(line: str) -> str:
    """Format a row of the corpus: a blank, the words, a blank and a newline; an empty row stays empty."""
    words = re.sub(r" *<unk>", "", line.strip()).strip()
    return f" {words} \n" if words else ""


def messages(document: str) -> list[dict[str, str]]:
    """List a dialogue's messages; rows of one speaker that follow each other are one message."""
    if not document.startswith("User: "):
        question, _, answer = document.partition("\n\n")
        turns = [("user", question), ("assistant", answer)]
    else:
        rows = (line.partition(": ") for line in document.split("\n"))
        turns = [(ROLES[who], said) for who, _, said in rows if who in ROLES]
    chat: list[dict[str, str]] = []
    for role, said in turns:
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += f" {said.strip()}"
        elif said.strip():
            chat.append({"role": role, "content": said.strip()})
    return chat


if __name__ == "__main__":
    main()
