"""The text's walls: how long each file may be, and what its sentences are like. .ci/run calls it,
the tests do not: somebody who adds a line to a copy must see no red test. Standard library only."""
import ast, io, json, re, sys, tokenize
from pathlib import Path

TESTS, NOTEBOOK = Path("test_vqldm.py"), Path("tutorial.ipynb")
source = Path("vqldm.py").read_text(encoding="utf8")
tree = ast.parse(source)

def prose_of(text):             # a block for each docstring and comment
    blocks, last = [], -1
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            blocks += re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            whole, words = not token.line[:token.start[1]].strip(), token.string.lstrip("#! ")
            if whole and token.start[0] == last + 1:
                blocks[-1] += " " + words
            else:
                blocks.append(words)
            last = token.start[0] if whole else -1
    return [b for b in blocks if not re.search(r"[─►]|^\s*\(?[A-Z](,| ·)|^[-=]{5}|SPDX", b)]

def sentences_of(blocks):       # of four words and more, without code and links
    for block in blocks:
        block = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block)
        block = re.sub(r"\s+", " ", re.sub(r"`[^`]*`|\$[^$]*\$", "CODE", block))
        block = re.sub(r"\b(eq|sec|app|fig|e\.g|i\.e|cf|vs)\.", r"\1", block)
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z(\"'*])", block):
            if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 4:
                yield sentence

def prose(blocks):              # -> % with two marks and more, marks in 100 words, % over 25 words
    found = list(sentences_of(blocks))
    marks = [len(re.findall(r"[;:(—–]", sentence)) for sentence in found]
    words = [len(re.findall(r"[\w'’\-]+", sentence)) for sentence in found]
    heavy, long = sum(m >= 2 for m in marks), sum(w > 25 for w in words)
    return 100 * heavy / len(found), 100 * sum(marks) / sum(words), 100 * long / len(found)

def markdown(text):
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.S)
    blocks = re.split(r"\n\s*\n|\n(?=[-*#|>\d])", text)
    return [b for b in blocks if b.strip() and b.strip()[0] not in "|#!<"]

def words(text):
    return len(re.findall(r"\S*\w\S*", text))

def line_of(pattern):           # the first line of the code that matches
    return source[:re.search(pattern, source, re.M).start()].count("\n") + 1

readme = Path("README.md").read_text(encoding="utf8")
cells = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
told = [b for c in cells if c["cell_type"] == "markdown" for b in markdown("".join(c["source"]))]
marks, readme_marks, notebook_marks = prose(prose_of(source)), prose(markdown(readme)), prose(told)
settings = re.findall(r"^    \w+: .* = ", source, re.M)
banners = re.findall(r"^# ((?:\d+|[A-Z])\. .*)$", source, re.M)
contents = re.sub(r"\s+", " ", ast.get_docstring(tree))
appendices = source.count("\n") + 1 - line_of(r"^# A\. ")
WALLS = [       # what, now, at most
    ("lines of vqldm.py", source.count("\n"), 1600),
    ("nodes of vqldm.py", sum(isinstance(n, (ast.expr, ast.stmt)) for n in ast.walk(tree)), 8500),
    ("lines of its appendices", appendices, 530),
    ("settings", len(settings), 44),
    ("line of the first network", line_of(r"^class \w+\(nn\.(?!Group)\w+\)"), 200),
    ("line of the first backward", line_of(r"\.backward\(\)"), 700),
    ("% of its sentences with two marks", marks[0], 12),
    ("marks in 100 of its words", marks[1], 5),
    ("lines of the tests", TESTS.read_text(encoding="utf8").count("\n"), 1400),
    ("lines of README", readme.count("\n"), 110),
    ("words of README", words(readme), 1500),
    ("words of its longest paragraph", max(words(b) for b in markdown(readme)), 60),
    ("% of its sentences over 25 words", readme_marks[2], 8),
    ("% of its sentences with two marks", readme_marks[0], 8),
    ("marks in 100 of README's words", readme_marks[1], 4),
    ("cells of the notebook", len(cells), 150),
    ("words of the notebook", sum(words(b) for b in told), 7000),
    ("MB of the notebook", NOTEBOOK.stat().st_size / 1e6, 1.8),
    ("% of its sentences with two marks", notebook_marks[0], 10),
    ("marks in 100 of its words", notebook_marks[1], 3.5),
    ("sections that the head does not name", sum(b not in contents for b in banners), 0)]

high = False
for what, now, most in WALLS:
    high |= now > most
    print(f"{'HIGH' if now > most else 'ok':5}{now:8.4g}  at most {most:<6} {what}")
sys.exit(high)
