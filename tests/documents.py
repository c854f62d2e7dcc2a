"""The commands that README, docs and deploy/ show, and what each would start."""

import re
import shlex
from pathlib import Path

from conftest import REPOSITORY, make_targets

PROGRAMS = (
    "make",
    "python",
    "python3",
    "torchrun",
    "torchserve",
    "curl",
    "docker",
    "kubectl",
    "helm",
)


def documents() -> list[Path]:
    patterns = ("README.md", "CONTRIBUTING.md", "docs/*.md", "deploy/*.md")
    return sorted(path for pattern in patterns for path in REPOSITORY.glob(pattern))


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in the order of the documents."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [block for path in documents() for block in fence.findall(path.read_text("utf-8"))]


def commands() -> list[str]:
    """Every command once: lines of bash blocks, continuations joined and comments left out, and
    commands with arguments that stand in a sentence (without any it is a target's name)."""
    lines = [line for block in blocks("bash") for line in re.sub(r"\\\n\s*", "", block).split("\n")]
    for path in documents():
        prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
        code = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        lines += [line for line in code if not re.fullmatch("make [a-z-]+|\\S+", line)]
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return list(dict.fromkeys(line for line in lines if line.split(" ")[0] in PROGRAMS))


def programs_of(command: str) -> list[list[str]]:
    """The project's own programs, module first, that a command would start. An ellipsis stands for
    what the reader has chosen before."""
    words = [word for word in shlex.split(command) if word != "..."]
    if words[0] == "make":
        goals = [word for word in words[1:] if "=" not in word]
        command = make_targets(*(goals or ["help"]), *(w for w in words[1:] if "=" in w))
    module = r"(?:-W ignore )?-m (?:-- )?((?:handler|training|export|tests)\..*)"
    started = re.findall(
        rf"(?:python|torchrun [^\n]*) {module}", re.sub("(?=python -)", "\n", command)
    )
    return [shlex.split(re.split(r";|\)|\|\|| && |' EXIT", program)[0]) for program in started]
