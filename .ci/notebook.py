"""The notebook: was it executed from top to bottom, and does it work as students use it? Its short
form is run with all solutions, with wrong and other right answers, each chapter once more after the
whole, with no bet answered, with nothing answered, as the core alone, in IPython, with an Interrupt
and in a kernel that is killed."""

import ast
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CELLS = json.loads((ROOT / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
CODE = [i for i, cell in enumerate(CELLS) if cell["cell_type"] == "code"]
TEXT = (HERE / "answers.txt").read_text(encoding="utf8")
ANSWERS = re.findall(r"^--- (\w+) (\w+)(?:: ([^\n]*))?\n(.*?)(?=^---|\Z)", TEXT, re.M | re.S)
BET = re.compile(r'^bet\("(.*)", \.\.\.\)', re.M)
FOLD = "<details><summary>After the run</summary>"
PAGE, BAD = {"__name__": "__main__"}, []  # what the cells see as their globals, and what failed


def solved(i):  # a cell, or the solution that stands below it
    after = SOURCES[i + 1] if i + 1 < len(CELLS) else ""
    solution = re.search(r">Solution.*?```python\n(.*?)```", after, re.S)
    return solution[1] if solution else SOURCES[i]


def run(code):  # -> what it prints, or the line of a refusal
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, "a cell", "exec"), PAGE)
    except Exception as e:
        if not hasattr(e, "_render_traceback_"):
            return f"an error: {e!r}"
        (line,) = e._render_traceback_()  # all that Jupyter shows
        return line
    return out.getvalue()


def need(ok, *what):
    print("ok " if ok else "BAD", *what)
    if not ok:
        BAD.append(what)


def executed():  # as it is saved
    ran = [cell for cell in CELLS if cell["cell_type"] == "code"]
    outputs = [output["output_type"] for cell in ran for output in cell["outputs"]]
    counts = [cell["execution_count"] for cell in ran]
    need(counts == [*range(1, len(ran) + 1)], "executed from top to bottom")
    need("error" not in outputs and outputs.count("display_data") > 25, "without an error")
    text = "\n".join(SOURCES)
    links = re.findall(r"\]\(#(.*?)\)", text)  # Jupyter names its headings like this
    heads = {head.replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M)}
    need(len(links) > 15 and set(links) <= heads, "its links lead somewhere", *set(links) - heads)
    first = SOURCES[CODE[0]].splitlines()
    need(len(first) < 17 and not any(";" in line for line in first), "a short first cell")
    lines = [line for i in CODE for line in SOURCES[i].splitlines()]
    need(max(map(len, lines)) <= 100, "no line of code above 100 columns")
    texts = [source for i, source in enumerate(SOURCES) if i not in CODE]
    words = len(" ".join(texts).split())
    need(words <= 9000 and len(lines) <= 660, words, "words and", len(lines), "lines of code")


def whole():
    for i in CODE:
        said = run(solved(i))
        if "○" in said or "not yet" in said or "an error" in said:
            need(False, "cell", i, said)


def changed(solution, lines):
    for line in lines.splitlines():
        before, after = [part.replace("\\n", "\n") for part in line.split(" =>")]
        if before not in solution:
            need(False, "is not in the solution:", before)
        solution = solution.replace(before, after.removeprefix(" "))
    return solution


def answers():
    right = {
        name: solved(i) for i in CODE for name in re.findall(r"^use\((\w+)\)", solved(i), re.M)
    }
    for kind, name, words, code in ANSWERS:
        said = run(f"{changed(right[name], code) if ' =>' in code else code}\nuse({name})")
        if kind == "wrong":
            need(said.startswith("not yet: ") and words and words in said, kind, name, said.strip())
        else:
            need("✓" in said, kind, said.strip())
        run(right[name])
    for name in right:
        kinds = sorted(kind for kind, of, *_ in ANSWERS if of == name)
        need(kinds[:1] == ["right"] and kinds.count("wrong") > 1, "answers of both kinds:", name)
    said = run("def predict(diffusion, out, z_t, t):\n    return out.nothing\nuse(predict)")
    need("predict stops" in said and "has no attribute 'nothing'" in said, "a bug:", said)
    run(right["predict"])
    for letters in RIGHT + WRONG:
        said = run(f"check('faults', {letters!r})")
        need(said.startswith("✓") == (letters in RIGHT), letters, said.strip())
    names = {"'update_ema'": "does all that", "'no_such'": "no function", "' To_Latents'": "✓"}
    for name, words in {**names, "vqldm.LatentDiffusion.to_latents": "✓"}.items():
        said = run(f"check('silenced', {name})")
        need(words in said, name, said.strip())
    for wrong in ("def add_noises(): ...\nuse(add_noises)", "use(...)", "use(7)"):
        said = run(wrong)
        need("wants one of the page's functions" in said, "not of the page:", repr(wrong))


RIGHT = ("BAE", "b, a, e", ["B", "A", "E"], "first B, then A, E", "the answer: BAE", "bae")
WRONG = ("BAD", "ABE", "BA", "the answer: ABE", "BAEB", "")


def again():  # each chapter alone, after the whole
    names = [head for source in SOURCES for head in re.findall(r"^## (.*)", source, re.M)]
    at = [i for i, s in enumerate(SOURCES) for _ in re.findall(r"^## ", s, re.M)]
    for name, start, end in zip(names, at, [*at[1:], len(CELLS)]):
        said = [run(solved(i)) for i in CODE if start <= i < end]
        need(not any(line.startswith(("not yet", "an error")) for line in said), "again:", name)


def first_cell_again():  # loses nothing
    second, folder, calls = PAGE["Second"].process, os.getcwd(), run("yours()")
    said = run(SOURCES[CODE[0]])
    kept = second is PAGE["Second"].process and folder == os.getcwd() and calls == run("yours()")
    need(not said and kept and calls.count("calls") > 13, "the first cell again:", calls.strip())


def stopped():  # each ends in one line
    said = run("run('train-ldm --vq nowhere --out none')")
    need(said.startswith("not yet: --vq nowhere: no checkpoint is there. Train it"), said)
    with unittest.mock.patch.object(PAGE["vqldm"], "main", side_effect=KeyboardInterrupt):
        said = run("run('train-ldm --vq vq --out none')")
    need(said.startswith("not yet: interrupted"), said)
    need(run("vqldm.load('none')").startswith("not yet: "), "a missing model")
    (first,) = [i for i in CODE if "second.done(1)" in SOURCES[i]]
    sys.modules["page"].OPEN = False
    for code, words in (("time.sleep(99)", "is still training"), ("exit('full')", "said: full")):
        run(f"Second.CODE = 'import time; ' + {code!r}\nsecond = Second('--out none')")
        if "exit" in code:
            PAGE["Second"].process.wait()
        said = run(SOURCES[first])
        need(words in said, said.strip())
    run("Second.process.kill()")


def names_in(code, context):  # of variables and functions that are written (Store) or read (Load)
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, context):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and context is ast.Store:
            found.add(node.name)
        elif isinstance(node, ast.arg) and context is ast.Store:
            found.add(node.arg)
    return found


def bets():
    told, veil = sys.modules["page"].ANSWERS, sys.modules["checks"].veil
    places = [i for i in CODE if BET.search(SOURCES[i])]
    clear = Path(sys.modules["page"].__file__).read_text(encoding="utf8")
    need(not any(f'"{veil(answer)}"' in clear for answer in told.values()), "no answer in clear")
    for i in places:
        (question,) = BET.findall(SOURCES[i])
        above, _, below = BET.split(SOURCES[i])
        computed = re.search(r"^was\(\S", below, re.M)
        literal = re.search(r"^was\(([\"'][^\"']*[\"']|[\d.]+)\)$", below, re.M)
        need(not literal, "no answer in the cell:", question)
        need(bool(computed and "was()" not in below) != (question in told), "known:", question)
        need(SOURCES[i + 1].startswith(FOLD), "what follows is folded:", question)
        numbers = set(re.findall(r"\d+", veil(told.get(question, ""))))
        odd = numbers - set(re.findall(r"\d+", SOURCES[i + 1].split("</details>")[0]))
        need(not odd, "the answer's numbers stand in the fold:", question, *odd)
        # Skipped alone, what is first written below the bet is missed by no later cell.
        mine = names_in(below, ast.Store) - names_in(above, ast.Store)
        earlier = set().union(*(names_in(SOURCES[j], ast.Store) for j in CODE if j < i))
        late = set()
        for j in CODE:
            if j > i:
                late |= (mine - earlier) & (
                    names_in(SOURCES[j], ast.Load) - names_in(SOURCES[j], ast.Store)
                )
        need(not late, "skipped alone:", question, *late)
    asked = {question for i in places for question in BET.findall(SOURCES[i])}
    need(set(told) <= asked, "every answer has its question", *set(told) - asked)
    fresh_page()  # of somebody who never guesses
    for i in CODE:
        said = run(solved(i))
        sys.modules["page"].OPEN = False
        stopped = said.startswith("not yet: first put your guess")
        if stopped != (i in places) or "an error" in said:
            need(False, "with no bet answered, cell", i, said[:200])
    need(True, "no bet answered,", len(places), "of them")
    said = run("bet('in strong noise the guesses lie', 7)\nwas()")
    need("you said 7, it was in the middle" in said, said.strip())
    said = run("bet('a number', 7)\nwas(10)")
    need("you said 7, it was 10" in said, said.strip())


def fresh_page():
    os.chdir(ROOT)  # the page's own folder goes with it
    PAGE.clear()
    PAGE["__name__"] = "__main__"
    for name in ("vqldm", "page", "checks"):
        sys.modules.pop(name, None)


def unanswered():  # and then the wrong answers all the same, each of which spoils the last picture
    fresh_page()
    said = [run(SOURCES[i]) for i in CODE]
    need(not any("an error" in one or "✓" in one for one in said), "nothing answered")
    solutions = re.findall(r">Solution (\d+)(.*?)<", "".join(SOURCES))
    exercises = [int(n) for n, half in solutions if not half]
    need(exercises == [*range(1, len(exercises) + 1)], "exercises are numbered from 1 on")
    need("".join(said).count("○") == len(solutions), "nothing answered,", len(solutions), "times")
    (last,) = [SOURCES[i] for i in CODE if "last, last_z0 = " in SOURCES[i]]
    run(last)
    before = PAGE["last"]
    for name, planted in PLANTED.items():
        place = sys.modules["checks"].PLACES[name]
        own, wrong = getattr(*place), eval(planted, PAGE)
        setattr(*place, wrong)
        said = run(last)
        spoiled = "an error" in said or not PAGE["torch"].equal(PAGE["last"], before)
        need(spoiled, "a wrong", name, "spoils the last picture")
        setattr(*place, own)
    run(last)
    need(PAGE["torch"].equal(PAGE["last"], before), "and nothing else does")


PLANTED = {  # (add_noise is called by a student's sample only, not by the program's)
    "predict": "lambda diffusion, out, z_t, t: (z_t, out)",
    "sample": "lambda diffusion, net, z, steps, eta, noise: [(z, z)] * steps",
    "guided": "lambda strong, *weaker: lambda z_t, t: z_t",
    "nearest": "lambda book, z: torch.zeros(len(z), *z.shape[2:], dtype=torch.long)",
}


def core():  # somebody who leaves out all of home
    code = "\n".join(SOURCES[i] for i in CODE if "core" in CELLS[i]["metadata"]["tags"])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    need(not done.returncode, "the core alone", done.stderr[-500:] if done.returncode else "")


IN_IPYTHON = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="nocolor")
for cell in {cells!r}:
    print("<<<", flush=True)
    shell.run_cell(cell)
"""


def in_ipython():  # what a student sees of frequent slips: one line each
    first = SOURCES[CODE[0]]
    cells = {
        "page is missing. Type %cd": first,
        "[Errno 2]": "%cd -q nowhere",
        "": f"%cd -q {ROOT}",
        " ": first,
        "needs quotes": 'bet("out of forty points come", copies)',
        "in words needs quotes": 'bet("out of forty points come", copies of them)',
        "run the cells above first": "add_noise",
        "no brackets behind add_noise": "def add_noise(z): ...\n\nuse(add_noise())",
        "vq: no checkpoint is there. Train it again": 'vqldm.load_checkpoint("vq", "--vq", "vq")',
        "put your guess": 'bet("out of forty points come", ...)',
        "interrupted before it was done": "raise KeyboardInterrupt",
        "would call itself": "def score(*given):\n    return score(*given)\n\nuse(score)",
        "stops at `return z @ e`": "def guess(z, e, abar, c):\n    return z @ e\n\nuse(guess)",
    }
    code = IN_IPYTHON.format(cells=list(cells.values()))
    env = {**os.environ, "VQLDM_FAST": "", "PYTHONPATH": ""}
    folder = tempfile.mkdtemp()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, env=env)
    said, words = done.stdout.split("<<<")[1:], done.stderr.strip()
    need("page is missing. Type %cd" in words, "in an empty folder:", words)
    for expected, one in list(zip(cells, said))[2:]:
        lines = one.strip().splitlines()
        fits = expected.strip() in one and len(lines) <= 1 and bool(lines) == bool(expected.strip())
        need(fits, "in one line:", expected, "" if fits else one)


SECOND = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a kernel does
second = Second("train-vq --preset tiny --n-images 60 --epochs 2 --lpips-weight 0 --out vq",
                "train-ldm --preset tiny --vq vq --epochs 1 --widths 8,16 --out ldm0")
try:
    print("STARTED", Second.process.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    second.wait(0, "100% val")
    second.wait(1, "100% val")
    print("READY", second.done(1))"""


def start():  # a page whose second process trains
    env = {**os.environ, "VQLDM_FAST": "0", "VQLDM_OPEN": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", f"{SOURCES[CODE[0]]}\n{SECOND}"],
        env=env,
        text=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    words = [""]
    while words[0] != "STARTED":
        words = child.stdout.readline().split() or [""]
    time.sleep(5)  # until stage 1 is under way
    return child, int(words[1])


def interrupted():  # as Jupyter does it: SIGINT to all of the kernel's group
    child, _ = start()
    os.killpg(child.pid, signal.SIGINT)
    said = child.stdout.read()
    done = said.count("100% val") == 2 and "READY True" in said
    need(done, "the second process trains on after an Interrupt", said)


def killed():  # as if memory had run out
    child, second = start()
    child.kill()
    child.wait()
    deadline = time.time() + 20
    while Path(f"/proc/{second}").exists() and time.time() < deadline:
        time.sleep(0.1)
    need(not Path(f"/proc/{second}").exists(), "the second process ends with a killed kernel")


if __name__ == "__main__":
    os.environ.update(VQLDM_FAST="1", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    os.chdir(ROOT)
    executed()
    whole()
    answers()
    again()
    first_cell_again()
    stopped()
    bets()
    unanswered()
    core()
    in_ipython()
    if os.name == "posix":
        interrupted()
    if Path("/proc").exists():
        killed()
    sys.exit(len(BAD))
