"""Name each decimal of the pages and of vqldm.py's comments that docs/RESULTS.md does not have.

    python .ci/page_numbers.py

What was measured stands in RESULTS, and no other page may have other digits. Code, links, versions
and arXiv's numbers are passed over, and so are numbers of vqldm.py's code, such as settings.
TEACHING's numbers are the notebook's."""

import re
import tokenize
from pathlib import Path

PAGES = "README.md", "docs/USING.md", "docs/CHANGING.md"
SKIPPED = r"```.*?```|`[^`\n]*`|\]\([^)]*\)|\b(Python|PyTorch|torch) [\d.]+|\b\d{4}\.\d{5}\b"
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?!\.?\d)")


def decimals(text):
    """-> (line, number) of each decimal. 0.50 and .5 are one number."""
    text = re.sub(SKIPPED, lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    for i, line in enumerate(text.splitlines(), start=1):
        for word in DECIMAL.findall(line):
            yield i, float(word)


root = Path(__file__).resolve().parent.parent
texts = {page: (root / page).read_text("utf-8") for page in PAGES}
known = {number for _, number in decimals((root / "docs/RESULTS.md").read_text("utf-8"))}
comments = [""] * 10_000  # by line
with (root / "vqldm.py").open(encoding="utf-8") as source:
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0] - 1] = token.string
        else:
            known |= {number for _, number in decimals(token.string)}
texts["vqldm.py"] = "\n".join(comments)
found = [(page, *one) for page, text in texts.items() for one in decimals(text)]
missing = [f"{page}:{line}: {number:g}" for page, line, number in found if number not in known]
if missing:
    raise SystemExit("\n".join([*missing, "docs/RESULTS.md does not have these numbers."]))
