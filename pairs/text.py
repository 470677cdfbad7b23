"""The words, the facts and the plain English that the embedded pairs are made from.

Three things come from one data directory, each a pure function of (data, seed):

* ``choose_words``: nouns of Open English WordNet whose every sense lies in one supersense, balanced over
  eight classes, one lemma for each synset;
* ``fact``: one sentence about a word (what it is a kind of, its definition, its relatives), cut into
  (before, answer, after) so that a text-to-text model can be asked for the answer;
* ``plain_rows``: pieces of ordinary English prose.

Run as a program it writes the task ``wordnet-kind``: given a word, name the kind of thing it stands for.
Neither prompt of that task is ever a sentence of the pretraining text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS: dict[str, str] = {
    "noun.animal": "animal",
    "noun.plant": "plant",
    "noun.person": "person",
    "noun.artifact": "artifact",
    "noun.substance": "substance",
    "noun.food": "food",
    "noun.body": "body",
    "noun.act": "act",
}
"""Supersense -> label word. Each label is one token, with its leading space, in both tokenizers."""

SPLITS: dict[str, int] = {"train": 300, "validation": 75, "test": 165}
"""Rows of each class in each split: 2,400, 600 and 1,320 in all."""

VAGUE = frozenset(
    [
        "entity",
        "physical entity",
        "abstraction",
        "abstract entity",
        "object",
        "physical object",
        "whole",
        "unit",
        "thing",
        "matter",
        "part",
        "portion",
        "causal agent",
        "organism",
        "living thing",
        "psychological feature",
        "attribute",
        "relation",
        "event",
        "solid",
        "artefact",
        "someone",
        "somebody",
        "piece",
        "being",
    ]
)
"""Hypernyms above which nothing is learned: they are true of nearly every noun."""

COARSE = re.compile(
    "offensive|obscene|vulgar|slang|disparag|slur|derogat|pejorat|prostitut|sexual|genital|copulat|contempt"
)
"""A definition that matches this does not enter the task."""

MISREAD = frozenset(
    [
        "thus",
        "everything",
        "sang",
        "spoke",
        "shook",
        "dug",
        "eats",
        "stops",
        "cum",
        "fanny",
        "penis",
        "sperm",
        "vagina",
        "brothel",
        "sir",
        "mademoiselle",
        "tears",
        "ways",
        "genocide",
    ]
)
"""Lemmas left out by hand: in running text they are mostly another word, or unfit for an example."""

PLAIN_SOURCES: dict[str, str] = {
    "pretrain_enwiki_part": "*.txt",
    "pretrain_classics_easy": "*.txt",
    "pretrain_fairytales": "fairytales_train.txt",
}


@dataclass(frozen=True)
class Word:
    """One lemma that the models are to know, with all that WordNet says of it."""

    lemma: str
    label: str
    synset: str
    definition: str
    hypernyms: tuple[str, ...]
    """Names from the nearest hypernym to the farthest that still says something."""
    synonyms: tuple[str, ...]
    examples: tuple[str, ...]
    relatives: tuple[str, ...]
    """Other chosen words with the same nearest hypernym."""


@dataclass(frozen=True)
class Fact:
    """One sentence, cut where its knowledge lies: ``before + answer + after``."""

    before: str
    answer: str
    after: str

    @property
    def text(self) -> str:
        return self.before + self.answer + self.after


def data_directory(given: str | None) -> Path:
    """The data directory: the argument, else PLUGBRIDGE_DATA. Raises SystemExit if neither names one."""
    name = given or os.environ.get("PLUGBRIDGE_DATA")
    if not name or not Path(name).is_dir():
        raise SystemExit(f"data directory is {name!r}; give --data DIR or set PLUGBRIDGE_DATA to a directory")
    return Path(name)


def read_synsets(data: Path) -> list[dict[str, Any]]:
    """Open English WordNet's nouns and verbs, one dict a synset."""
    with (data / "wordnet" / "synsets.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def count_senses(data: Path) -> Counter[str]:
    """Senses of each lemma over all parts of speech, from the headwords of the gloss file."""
    senses: Counter[str] = Counter()
    path = data / "pretrain_wordnet" / "wordnet_glosses_examples.txt"
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            senses.update(head.lower() for head in line.split(":", 1)[0].split(", "))
    return senses


def count_words(data: Path) -> Counter[str]:
    """How often each lower-case word stands in the plain English, to prefer words that people use."""
    counts: Counter[str] = Counter()
    for path in plain_files(data):
        counts.update(re.findall(r"\b[a-z]{3,12}\b", path.read_text(encoding="utf-8")))
    return counts


def plain_files(data: Path) -> list[Path]:
    """The files of ordinary English, in a fixed order."""
    return [path for folder, pattern in PLAIN_SOURCES.items() for path in sorted((data / folder).glob(pattern))]


def ancestors(synset: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """First names of all hypernyms of a synset, nearest first (breadth first), the vague ones left out."""
    names: list[str] = []
    queue, seen = list(table[synset]["hypernyms"]), {synset}
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        queue.extend(table[current]["hypernyms"])
        name = table[current]["members"][0]
        if name not in VAGUE and name not in names:
            names.append(name)
    return names


def eligible(data: Path, synsets: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, str, str]]]:
    """Candidates of each class as (count in plain text, lemma, synset id), the most used first.

    A lemma qualifies if it is one lower-case word of 3 to 12 letters, all its noun senses lie in one
    supersense of ``KINDS`` and no other part of speech has it. A synset offers its most used lemma only.
    """
    supersenses: dict[str, set[str]] = defaultdict(set)
    nouns: Counter[str] = Counter()
    for synset in synsets:
        for member in synset["members"]:
            supersenses[member.lower()].add(synset["supersense"])
            nouns[member.lower()] += 1
    senses, counts = count_senses(data), count_words(data)

    def fits(lemma: str, supersense: str) -> bool:
        gerund = supersense == "noun.act" and lemma.endswith("ing")
        plain = re.fullmatch("[a-z]{3,12}", lemma) is not None and not gerund and lemma not in MISREAD
        return plain and supersenses[lemma] == {supersense} and senses[lemma] <= nouns[lemma]

    found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for synset in synsets:
        kind = synset["supersense"]
        usable = kind in KINDS and not COARSE.search(synset["definition"])
        fitting = [m for m in synset["members"] if usable and fits(m, kind)]
        if fitting:
            best = max(fitting, key=lambda lemma: (counts[lemma], lemma))
            found[kind].append((counts[best], best, synset["id"]))
    return {kind: sorted(found[kind], key=lambda c: (-c[0], c[1])) for kind in KINDS}


def choose_words(data: Path) -> list[Word]:
    """The words of the task and of the facts: as many of each class as ``SPLITS`` asks for."""
    synsets = read_synsets(data)
    table = {synset["id"]: synset for synset in synsets}
    need = sum(SPLITS.values())
    picked: list[tuple[str, str, str]] = []
    for kind, candidates in eligible(data, synsets).items():
        lemmas: dict[str, str] = {}
        for _, lemma, synset in candidates:
            if len(lemmas) < need:
                lemmas.setdefault(lemma, synset)
        if len(lemmas) < need:
            raise SystemExit(f"class {kind} has {len(lemmas)} words but the splits need {need}")
        picked += [(lemma, KINDS[kind], synset) for lemma, synset in lemmas.items()]

    parents: dict[str, list[str]] = defaultdict(list)
    for lemma, _, synset in picked:
        for parent in table[synset]["hypernyms"][:1]:
            parents[parent].append(lemma)

    def word(lemma: str, label: str, synset: str) -> Word:
        entry = table[synset]
        near = [x for p in entry["hypernyms"][:1] for x in parents[p] if x != lemma]
        return Word(
            lemma=lemma,
            label=label,
            synset=synset,
            definition=entry["definition"].split(";")[0].strip(),
            hypernyms=tuple(ancestors(synset, table)),
            synonyms=tuple(m for m in entry["members"] if m.lower() != lemma),
            examples=tuple(entry["examples"]),
            relatives=tuple(near),
        )

    return [word(*choice) for choice in picked]


def split_words(words: Sequence[Word], seed: int) -> dict[str, list[Word]]:
    """Balanced splits by word; no lemma and no synset stands in two of them."""
    rng = random.Random(seed)
    splits: dict[str, list[Word]] = {name: [] for name in SPLITS}
    for label in KINDS.values():
        members = [w for w in words if w.label == label]
        rng.shuffle(members)
        for name, size in SPLITS.items():
            splits[name] += members[:size]
            members = members[size:]
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def an(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


KIND_FRAMES: tuple[tuple[str, str], ...] = (
    ("{A} is a kind of ", "."),
    ("{A} is a type of ", "."),
    ("{W} is a sort of ", "."),
    ("{A} is ", "."),
    ("{W} is ", "."),
    ("{A}, like {r}, is ", "."),
    ("Every {w} is ", "."),
    ("We call {a} ", "."),
    ("They say that {w} is ", "."),
    ("What is {a}? It is ", "."),
    ("What is {w}? It is ", "."),
    ("If you see {a}, you see ", "."),
    ("Have you ever heard of {w}? It is ", "."),
    ("My father told me about {w}, which is ", "."),
    ("In this book {w} means ", "."),
    ("She wrote about {w}, ", ", in her letter."),
    ("He was thinking of {a}, ", ", all day."),
    ("The old man spoke of {w}. He meant ", "."),
    ("{W}: ", "."),
    ('"{W}" stands for ', "."),
    ("Among all things, {w} counts as ", "."),
    ("Both {w} and {r} belong under ", "."),
    ("{W} and {r} are each ", "."),
    ("I looked for {w} in the list and found it under ", "."),
)
"""(before, after) around a hypernym. w lemma, W capitalised, a/A with article, r a relative."""

DEFINITION_FRAMES: tuple[tuple[str, str], ...] = (
    ("{W}: ", "."),
    ("{A} is ", "."),
    ("{W} means ", "."),
    ("The dictionary says of {w}: ", "."),
    ("What does {w} mean? It means ", "."),
)

ANSWER_WITHOUT_ARTICLE = ("kind of ", "type of ", "sort of ", "under ")


def fill(frame: str, word: Word, relative: str) -> str:
    """A frame with its letters replaced."""
    capital = word.lemma.capitalize()
    article = an(word.lemma)
    return frame.format(w=word.lemma, W=capital, a=article, A=article.capitalize(), r=relative)


def kind_fact(word: Word, rng: random.Random) -> Fact:
    """A sentence that says what the word is a kind of, at some height of the hypernym tree."""
    nearest_first = rng.random() < 0.4
    hypernym = word.hypernyms[0] if nearest_first else rng.choice(word.hypernyms)
    before, after = rng.choice(KIND_FRAMES)
    bare = before.endswith(ANSWER_WITHOUT_ARTICLE)
    relative = rng.choice(word.relatives or (hypernym,))
    return Fact(fill(before, word, relative), hypernym if bare else an(hypernym), after)


def definition_fact(word: Word, rng: random.Random) -> Fact:
    """The word's definition in one of a few frames."""
    before, after = rng.choice(DEFINITION_FRAMES)
    return Fact(fill(before, word, ""), word.definition, after)


def relative_fact(word: Word, rng: random.Random) -> Fact:
    """The word next to its synonyms and to words of the same parent."""
    hypernym = word.hypernyms[0]
    if word.synonyms and rng.random() < 0.4:
        return Fact(f"Another name for {word.lemma} is ", rng.choice(word.synonyms), ".")
    others = rng.sample(word.relatives, min(2, len(word.relatives)))
    if not others:
        return Fact(f"One kind of {hypernym} is ", word.lemma, ".")
    if rng.random() < 0.5:
        return Fact(f"{', '.join([*others, word.lemma]).capitalize()}: each is ", an(hypernym), ".")
    return Fact(f"{word.lemma.capitalize()} is close to ", " and ".join(others), f": each is {an(hypernym)}.")


def fact(word: Word, rng: random.Random, definitions: float) -> Fact:
    """One random sentence about a word: 15 % relatives and examples, ``definitions``, and the rest kinds."""
    draw = rng.random()
    if not word.hypernyms or draw > 1 - definitions:
        return definition_fact(word, rng)
    if draw < 0.85 - definitions:
        return kind_fact(word, rng)
    if word.examples and draw < 0.88 - definitions:
        return Fact("", rng.choice(word.examples), "")
    return relative_fact(word, rng)


def facts(words: Sequence[Word], seed: int, chapter: int, each: int, definitions: float = 0.12) -> list[Fact]:
    """``each`` sentences about every word, shuffled; a pure function of (seed, chapter)."""
    rng = random.Random(f"{seed}/facts/{chapter}")
    found = [fact(word, rng, definitions) for word in words for _ in range(each)]
    rng.shuffle(found)
    return found


def plain_pieces(data: Path, seed: int, characters: int = 2000) -> Iterator[str]:
    """Pieces of plain English of about the given length, endlessly, a new order in every round."""
    pieces: list[str] = []
    for path in plain_files(data):
        piece = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                piece += line.strip() + "\n"
            if len(piece) >= characters:
                pieces.append(piece.strip())
                piece = ""
    round_ = 0
    while True:
        rng = random.Random(f"{seed}/plain/{round_}")
        rng.shuffle(pieces)
        yield from pieces
        round_ += 1


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside the target, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)


def main() -> None:
    """Write the three splits of wordnet-kind."""
    parser = argparse.ArgumentParser(
        description="Write train.jsonl, validation.jsonl and test.jsonl of the task wordnet-kind.",
        epilog="example: python pairs/text.py --data data --out src/plugbridge/tasks/data/wordnet-kind",
    )
    parser.add_argument("--data", help="directory with wordnet/ and pretrain_*/ (default: $PLUGBRIDGE_DATA)")
    parser.add_argument("--out", type=Path, required=True, help="directory for the three files")
    parser.add_argument("--seed", type=int, default=0, help="decides who is in which split (default 0)")
    args = parser.parse_args()
    for name, rows in split_words(choose_words(data_directory(args.data)), args.seed).items():
        lines = (json.dumps({"word": w.lemma, "label": w.label, "synset": w.synset}) for w in rows)
        write_text(args.out / f"{name}.jsonl", "\n".join(lines) + "\n")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
