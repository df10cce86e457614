"""One word for one thing: each class of the glossary exists once, and old words do not come back."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "inference_api"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# The changelog names what there was.
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"})
GLOSSARY = (ROOT / "CONTRIBUTING.md").read_text().split("## Glossary\n")[1].split("\n## ")[0]

# Two classes of one name that may be, and why.
TWICE = {
    "Deadlines": "of a client connection, and of an exchange with a backend: neither room knows the other",
    "RepeatedHead": "the same idea on either side: of requests, and of answers",
    "RepeatedHeads": "as above",
    "Event": "of a watch of Kubernetes, and of a stream: each used in its own module",
}

# Words that had two meanings, or none that a stranger knows.
BANNED = (
    "replicas?",
    "leash",
    "toys?",
    "gate",
    "surface",
    "memo",
    "departure",
    "suspects",
    "observation",
    "observer",
    "heard",
    "hears?",
    "(is|are) told",
    "tells",
    "believe[sd]?",
)


def classes() -> dict[str, list[str]]:
    """Where each class is. The demo is another program, which has the engines' words."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        if "demo" not in path.relative_to(PACKAGE).parts:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(str(path.relative_to(PACKAGE)))
    return found


CLASSES = classes()
WORDS = re.findall(r"\*\*(\w+)\*\*", "\n".join(line for line in GLOSSARY.splitlines() if line.startswith("|")))


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_glossary_is_a_class(word: str) -> None:
    assert word in CLASSES


def test_the_glossary_is_sorted_and_has_each_word_once() -> None:
    rows = [row.strip("*") for row in re.findall(r"^\| (\*?\*?[\w ]+?\*?\*?) \|", GLOSSARY, re.MULTILINE)][1:]

    assert len(set(WORDS)) == len(WORDS)
    assert rows == sorted(rows, key=str.lower)


def test_no_two_classes_have_one_name() -> None:
    twice = {name: places for name, places in CLASSES.items() if len(places) > 1 and not name.startswith("_")}
    # Each feature calls its settings so.
    twice = {name: places for name, places in twice.items() if name != "Options"}

    assert twice.keys() == TWICE.keys(), twice


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_old_words_do_not_come_back(path: Path) -> None:
    text = path.read_text()
    # Kubernetes' word for pods of one Deployment, as code
    text = re.sub(r"`[^`\n]*replica[^`\n]*`", "", text)

    assert [found[0] for found in re.finditer(rf"(?<![\w-])({'|'.join(BANNED)})(?![\w-])", text, re.IGNORECASE)] == []
