"""The page as students use it, in its short form: all solutions, wrong and other right answers for
each checked function, every chapter once more after the whole, no bet answered, the core alone, and
Interrupt."""

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
from pathlib import Path

HERE = Path(__file__).resolve().parent
CELLS = json.loads((HERE.parent / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
CODE = [i for i, cell in enumerate(CELLS) if cell["cell_type"] == "code"]
TEXT = (HERE / "answers.txt").read_text(encoding="utf8")
ANSWERS = re.findall(r"^--- (\w+) (\w+)(?:: ([^\n]*))?\n(.*?)(?=^---|\Z)", TEXT, re.M | re.S)
BET = re.compile(r'^bet\("(.*)", \.\.\.\)', re.M)
PAGE, BAD = {"__name__": "page"}, []


def solved(i):  # a cell, or the solution that stands below it
    after = SOURCES[i + 1] if i + 1 < len(CELLS) else ""
    solution = re.search(r">Solution.*?```python\n(.*?)```", after, re.S)
    return solution[1] if solution else SOURCES[i]


def run(code):  # -> what it prints, or the line of a refusal
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, "page", "exec"), PAGE)
    except Exception as e:
        if not isinstance(e, PAGE["NotYet"]):
            return f"an error: {e!r}"
        (line,) = e._render_traceback_()  # all that Jupyter shows
        return line
    return out.getvalue()


def need(ok, *what):
    print("ok " if ok else "BAD", *what)
    if not ok:
        BAD.append(what)


def whole():
    for i in CODE:
        said = run(solved(i))
        if "○" in said or "not yet" in said or "an error" in said:
            need(False, "cell", i, said)


def answers():
    right = {
        name: solved(i) for i in CODE for name in re.findall(r"^use\((\w+)\)", solved(i), re.M)
    }
    step = right["one_step"].replace("use(one_step)", "")
    wrong_steps = []
    for part, words in (
        ("    disc.zero_grad()\n", "in the discriminator is not that of train_vq"),
        (" + vqgan.cfg.commit_weight * commit_loss", "in the VQGAN is not that of train_vq"),
        (" + vqgan.cfg.gan_weight * lam * adversarial", "in the VQGAN is not that of train_vq"),
        ("    muon.step()\n", "in the VQGAN is not that of train_vq"),
    ):
        assert part in step
        wrong_steps.append(("wrong", "one_step", words, step.replace(part, "")))
    every = [*ANSWERS, *wrong_steps]
    for kind, name, words, code in every:
        said = run(f"{code}\nuse({name})")
        if kind == "wrong":
            need(said.startswith("not yet: ") and words and words in said, kind, name, said.strip())
        else:
            need("✓" in said, kind, said.strip())
        run(right[name])
    for name in right:
        kinds = [kind for kind, of, *_ in every if of == name]
        enough = kinds.count("wrong") >= 1 and kinds.count("right") >= 2
        need(enough, "answers of both kinds:", name)
    said = run("def predict(diffusion, out, z_t, t):\n    return out.nothing\nuse(predict)")
    need(said.startswith("an error: AttributeError"), "a bug is no wrong answer:", said)
    run(right["predict"])
    for letters in ("BAE", "BAD", "ABE", "BA"):
        said = run(f"check('faults', {letters!r})")
        need(said.startswith("✓") == (letters == "BAE"), letters, said.strip())
    for name, words in (("update_ema", "was not silenced"), ("no_such", "no function")):
        said = run(f"check('silenced', {name!r})")
        need(words in said, name, said.strip())


def again():  # each chapter alone, after the whole
    names = [head for source in SOURCES for head in re.findall(r"^## (.*)", source, re.M)]
    at = [i for i, s in enumerate(SOURCES) for _ in re.findall(r"^## ", s, re.M)]
    for name, start, end in zip(names, at, [*at[1:], len(CELLS)]):
        said = [run(solved(i)) for i in CODE if start <= i < end]
        need(not any(line.startswith(("not yet", "an error")) for line in said), "again:", name)


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
    told, places = PAGE["ANSWERS"], [i for i in CODE if BET.search(SOURCES[i])]
    for i in places:
        (question,) = BET.findall(SOURCES[i])
        above, below = BET.split(SOURCES[i])[0], BET.split(SOURCES[i])[2]
        computed = re.search(r"^was\(\S", below, re.M)
        need(not re.search(r"^was\([\"'\d(\[]", below, re.M), "no answer in the cell:", question)
        need(bool(computed and "was()" not in below) != (question in told), "known:", question)
        if isinstance(answer := told.get(question), str):
            sentence = SOURCES[i + 1].split(". ")[0]
            hidden = len(answer) < 3 or answer.lower() not in sentence.lower()
            if len(answer.split()) > 2:  # shorter ones are among the labels of the picture
                hidden = hidden and answer.lower() not in SOURCES[i].lower()
            need(hidden, "not said too early:", question)
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
    os.chdir(HERE)  # for the page's own folder goes with it
    PAGE.clear()  # and now a new page, of somebody who never guesses
    PAGE["__name__"] = "page"
    sys.modules.pop("vqldm")
    for i in CODE:
        if i == CODE[1]:
            PAGE["OPEN"] = False
        said = run(solved(i))
        stopped = said.startswith("not yet: first put your guess")
        if stopped != (i in places) or "an error" in said:
            need(False, "with no bet answered, cell", i, said[:200])
    need(True, "no bet answered,", len(places), "of them")
    said = run("bet('enough steps for the arms', 7)\nwas()")
    need("you said 7, it was 10, so you were off by 3" in said, said.strip())
    need("bent" in (said := run("bet('straight?', 'bent')\nwas('x')")), said.strip())
    PAGE["OPEN"] = True


def core():  # somebody who leaves out all of home
    code = "\n".join(SOURCES[i] for i in CODE if "core" in CELLS[i]["metadata"]["tags"])
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    need(not done.returncode, "the core alone", done.stderr[-500:] if done.returncode else "")
    # Somebody whose page lies elsewhere. One sentence says what to do.
    command = [sys.executable, "-c", SOURCES[CODE[0]]]
    done = subprocess.run(command, text=True, capture_output=True, env={**env, "PYTHONPATH": ""})
    need("vqldm is missing. Put vqldm.py" in done.stderr, "without vqldm.py")


def interrupted():  # as Jupyter does it: SIGINT to all of the kernel's group
    code = "\n".join(
        [
            SOURCES[CODE[0]],
            SOURCES[CODE[1]],
            """
Start("train-vq --preset tiny --n-images 600 --epochs 40 --out vq")
try:
    print("READY", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(3)
    print("ALIVE", Start.process.poll() is None, flush=True)
Start.process.kill()""",
        ]
    )
    env = {**os.environ, "VQLDM_FAST": "0", "VQLDM_OPEN": "1", "PYTHONPATH": str(HERE.parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        text=True,
        cwd=os.getcwd(),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    while "READY" not in child.stdout.readline():
        pass
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)  # until stage 1 is under way
    os.killpg(child.pid, signal.SIGINT)
    need("ALIVE True" in child.stdout.read(), "stage 1 trains on after an Interrupt")


if __name__ == "__main__":
    os.environ.update(VQLDM_FAST="1", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    sys.path.insert(0, str(HERE.parent))
    os.chdir(tempfile.mkdtemp())
    whole()
    answers()
    again()
    bets()
    core()
    if os.name == "posix":
        interrupted()
    sys.exit(len(BAD))
