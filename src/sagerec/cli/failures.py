"""What goes wrong, in one line: the flag, what was got, what was expected.

Settings and flags that cannot be end with status 2, what else a user or the machine caused with 1. A fault of sagerec's
own keeps its traceback.
"""

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from sagerec.artifacts import UNREADABLE
from sagerec.errors import SagerecError, SettingsError
from sagerec.training import parallel

BOX, RULE = "╭╮╰╯│|", "─-+"
"""What the parser draws its messages with, where the terminal has such characters and where not."""
OF_RANKS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
"""What the errors of PyTorch's process groups name."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


def parser_line(box: str) -> str:
    """The parser's message, a box of several lines, in one: what is wrong, and what a value should be."""
    parts: list[list[str]] = [[]]
    for line in (line.strip(f"{BOX} ") for line in box.splitlines()[1:]):
        if line.strip(RULE):
            parts[-1].append(line)
        else:
            parts.append([])
    said, *others = [part for part in parts if part] or [["this command line cannot be read"]]
    message = " ".join(said).rstrip(".")
    if (wrong := re.match(r"Error parsing (\S+): .*?('[^']*'|[^\s:]+?)\]?$", message)) is None:
        return message
    flag = wrong[1].rpartition("/")[2]
    usage = next((part[1] for part in others if part[0] == "Argument helptext:" and len(part) > 1), "")
    return f"{flag} is {wrong[2]}; expected {usage.rpartition(flag)[2].strip() or 'another value'}"


def flagged(message: str, words: Sequence[str]) -> str:
    """A message that names a setting (`epochs is 0; …`), or quotes a value, with the flag of `words` that gave it."""
    if message.startswith("-"):
        return message
    name = re.match(r"(\w+) is ", message)
    quoted = re.search(r"'([^']+)'", message)
    for i, word in enumerate(words):
        flag, _, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*", flag):
            continue
        if name and flag.rpartition(".")[2].lstrip("-").replace("-", "_") == name[1]:
            return flag + message[len(name[1]) :]
        given = (value or " ".join(words[i + 1 : i + 2])) if name is None else ""
        if quoted and quoted[1] in given:
            return f"{flag} {given}: {message}"
    return message


def explain(error: BaseException, words: Sequence[str], *, while_parsing: bool) -> tuple[int, str] | None:
    """Exit status and line of what a user or the machine caused; None for a fault of our own."""
    if isinstance(error, SagerecError):
        of_settings = while_parsing or isinstance(error, SettingsError)
        return (2, flagged(str(error), words)) if of_settings else (1, str(error))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{error.strerror or error}"
    text = " ".join(str(error).split())
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if memory or (isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY)):
        return 1, f"out of memory ({text[:200] or type(error).__name__}); give smaller batches, fewer beams or slates"
    of_ranks = isinstance(error, dist.DistError) or any(part in text.lower() for part in OF_RANKS)
    if parallel.launched() > 1 and isinstance(error, RuntimeError) and of_ranks:
        return 1, parallel.LOST
    return (1, text[:500]) if isinstance(error, (*UNREADABLE, SafetensorError)) else None
