"""Write core/captions.txt: 4096 invented captions, over whose CLIP token encodings the covariance C is estimated.

Run with `python -m bench.captions`. A seeded grammar: a line of TEMPLATES, its {slots} filled from WORDS, then a letter
case. The slots follow word classes (a farm animal, a room, a drink), so that the captions read like real ones. No real
person, artist or brand is named; the brands are made up. Same seed, same file.
"""
import random
import re
from pathlib import Path

COUNT = 4096
LONGEST = 46  # words: keeps every caption under CLIP's 75 tokens
OUTPUT = Path(__file__).parent.parent / "core" / "captions.txt"

# One class per block, "name = item, item"; an item may hold slots of its own.
WORDS = Path(__file__).with_name("captions_words.txt").read_text(encoding="utf-8")
# One template a line, a long one going on after a blank; "a" becomes "an" by sound, {x*} is the plural, {year} and the
# other numbers come from filler().
TEMPLATES = Path(__file__).with_name("captions_templates.txt").read_text(encoding="utf-8")
IRREGULAR = dict(pair.split() for pair in """goose geese, calf calves, wolf wolves, shelf shelves, leaf leaves,
sheep sheep, deer deer, moose moose, squid squid, shrimp shrimp, salmon salmon, bison bison, ox oxen, drums drums,
bagpipes bagpipes,
child children, tomato tomatoes, potato potatoes, mango mangoes""".split(","))
SMALL_WORDS = set("a an and at by for from in of on or the to with".split())  # stay small in Title Case


def filler() -> dict[str, list[str]]:
    """Return the items of every slot."""
    blocks = re.findall(r"^(\w+) = (.*(?:\n .*)*)", WORDS, re.M)
    slots = {name: [" ".join(item.split()) for item in items.rstrip(", ").split(",")] for name, items in blocks}
    return slots | {
        "year": [str(year) for year in range(1968, 2026)], "old": [str(year) for year in range(1887, 1984)],
        "n": [str(n) for n in range(2, 13)] + "two three four five six seven".split(),
        "minutes": "5 10 15 20 30 45".split(), "size": [str(n) for n in range(18, 130, 7)],
        "letter": "S M L XL".split(), "height": [str(n) for n in range(4, 60, 3)],
        "day": [str(n) for n in range(1, 31)], "score": "2-1 3-0 4-2".split(),
        "fortune": ["$895", "$1,600", "$2,350", "€1250", "£740", "3,900 EUR", "$12,500"],
        "price": ["$" + n for n in "4.99 19.95 35 120 249.00 1,450".split()] + ["£15", "£89.50", "€40", "1200 EUR"],
        "years": [str(n) for n in range(19, 88)],
        "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()}


def plural(noun: str) -> str:
    """Return the plural of a noun phrase: of its last word, or of the word before "of"."""
    head, of, rest = noun.partition(" of ")
    start, space, last = head.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith("man"):
        last = last[:-3] + "men"
    elif last.endswith("fish"):
        pass
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "es" if re.search(r"(s|x|ch|sh)$", last) else "s"
    return start + space + last + of + rest


def articles(text: str) -> str:
    """Put "an" for "a" before a vowel sound."""
    sound = r"(?!uni|uk|use|eu|one\b|of\b|and\b)(?:[aeiouéAEIOU]|8|11|18|hour|SUV|LED|x-ray)"
    return re.sub(rf"\b([Aa]) (?=[\"']?{sound})", r"\1n ", text)


def expand(template: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """Fill the slots of a template, nested ones too, using no item twice."""
    used = set()
    while match := re.search(r"\{(\w+)(\*?)\}", template):
        item = rng.choice([item for item in slots[match[1]] if "{" in item or item not in used])
        used.add(item)
        if match[2]:
            item = item[:-1] + "*}" if "{" in item else plural(item)  # the last slot is the noun
        template = template[:match.start()] + item + template[match.end():]
    return articles(template)


def recase(text: str, rng: random.Random) -> str:
    """Return the text in one of the letter cases people type: sentence, lower, Title."""
    kind = rng.choices(["sentence", "lower", "title"], [5, 4, 2])[0]
    if kind == "lower":
        return text.lower()
    if kind == "title" and len(text.split()) < 12:
        return " ".join(w if w in SMALL_WORDS and i else w[:1].upper() + w[1:] for i, w in enumerate(text.split()))
    return text[:1].upper() + text[1:]


def captions(seed: int = 0) -> list[str]:
    """Return COUNT distinct captions in the order drawn."""
    rng, slots, templates = random.Random(seed), filler(), TEMPLATES.strip().replace("\n ", " ").split("\n")
    found, seen = [], set()
    while len(found) < COUNT:
        text = expand(templates[rng.randrange(len(templates))], slots, rng)
        if text.lower() not in seen and len(text.split()) <= LONGEST:
            seen.add(text.lower())
            found.append(recase(text, rng))
    return found


if __name__ == "__main__":
    OUTPUT.write_text("\n".join(captions()) + "\n", encoding="utf-8", newline="\n")
