"""Write WikiText-2's training tokens as the text that perplexity is usually measured on.

Rows are joined by two newlines, as in the usual test string, and the placeholders of unknown words are taken out:

    python book/training_text.py wikitext2-train.txt.xz wikitext2-train.txt
"""

import lzma
import re
import sys
from pathlib import Path


def main() -> None:
    """Convert the file named first into the one named second."""
    source, target = (Path(name) for name in sys.argv[1:3])
    content = source.read_bytes()
    text = (lzma.decompress(content) if source.suffix == ".xz" else content).decode("utf-8")
    target.write_text("\n\n".join(row(line) for line in text.split("\n")), encoding="utf-8")


def row(line: str) -> str:
    """A row of the corpus: a blank, the words, a blank and a newline; nothing for an empty one."""
    words = re.sub(r" *<unk>", "", line.strip()).strip()
    return f" {words} \n" if words else ""


if __name__ == "__main__":
    main()
