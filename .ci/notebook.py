"""The page as students use it, in its short form: all solutions, wrong and other right answers for
each checked function, every chapter once more after the whole, the core alone, and Interrupt."""
import contextlib, io, json, os, re, signal, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CELLS = json.loads((HERE.parent / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
CODE = [i for i, cell in enumerate(CELLS) if cell["cell_type"] == "code"]
TEXT = (HERE / "answers.txt").read_text(encoding="utf8")
ANSWERS = re.findall(r"^--- (\w+) (\w+)\n(.*?)(?=^---|\Z)", TEXT, re.M | re.S)
PAGE, BAD = {"__name__": "page"}, []

def solved(i):                          # a cell, or the solution that stands below it
    after = SOURCES[i + 1] if i + 1 < len(CELLS) else ""
    solution = re.search(r">Solution.*?```python\n(.*?)```", after, re.S)
    return solution[1] if solution else SOURCES[i]
def run(code):                          # -> what it prints, or the line of a refusal
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, "page", "exec"), PAGE)
    except Exception as e:
        if not isinstance(e, PAGE["NotYet"]):
            return f"an error: {e!r}"
        (line,) = e._render_traceback_()        # all that Jupyter shows
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
    right = {name: solved(i) for i in CODE
             for name in re.findall(r"^use\((\w+)\)", solved(i), re.M)}
    step = right["one_step"].replace("use(one_step)", "")
    wrong_steps = [("wrong", "one_step", step.replace(part, "")) for part in (
        "    disc.zero_grad()\n", " + vqgan.cfg.commit_weight * commit_loss",
        " + vqgan.cfg.gan_weight * lam * adversarial", "    muon.step()\n")]
    for kind, name, code in [*ANSWERS, *wrong_steps]:
        said = run(f"{code}\nuse({name})")
        need(said.startswith("not yet: ") if kind == "wrong" else "✓" in said, kind, said.strip())
        run(right[name])
    counts = {(kind, name): sum(a[:2] == (kind, name) for a in [*ANSWERS, *wrong_steps])
              for kind in ("wrong", "right") for name in right}
    few = [key for key, n in counts.items() if n < (1 if key[0] == "wrong" else 2)]
    need(not few, "answers of both kinds for each function", *few)
    said = run("def predict(diffusion, out, z_t, t):\n    return out.nothing\nuse(predict)")
    need(said.startswith("an error: AttributeError"), "a bug is no wrong answer:", said)
    run(right["predict"])
    for letters in ("BAE", "BAD", "ABE", "BA"):
        said = run(f"check('faults', {letters!r})")
        need(said.startswith("✓") == (letters == "BAE"), letters, said.strip())
def again():                            # each chapter alone, after the whole
    names = [head for source in SOURCES for head in re.findall(r"^## (.*)", source, re.M)]
    at = [i for i, s in enumerate(SOURCES) for _ in re.findall(r"^## ", s, re.M)]
    for name, start, end in zip(names, at, [*at[1:], len(CELLS)]):
        said = [run(solved(i)) for i in CODE if start <= i < end]
        need(not any(line.startswith(("not yet", "an error")) for line in said), "again:", name)

def core():                             # somebody who leaves out all of home
    code = "\n".join(SOURCES[i] for i in CODE if "core" in CELLS[i]["metadata"]["tags"])
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    need(not done.returncode, "the core alone", done.stderr[-500:] if done.returncode else "")

def interrupted():                      # as Jupyter does it: SIGINT to all of the kernel's group
    code = "\n".join([SOURCES[CODE[0]], SOURCES[CODE[1]], """
Start("train-vq --preset tiny --n-images 600 --epochs 40 --out vq")
try:
    print("READY", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(3)
    print("ALIVE", Start.process.poll() is None, flush=True)
Start.process.kill()"""])
    env = {**os.environ, "VQLDM_FAST": "0", "VQLDM_OPEN": "1", "PYTHONPATH": str(HERE.parent)}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, text=True, cwd=os.getcwd(),
                             stdout=subprocess.PIPE, start_new_session=True)
    while "READY" not in child.stdout.readline():
        pass
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)                   # until stage 1 is under way
    os.killpg(child.pid, signal.SIGINT)
    need("ALIVE True" in child.stdout.read(), "stage 1 trains on after an Interrupt")

if __name__ == "__main__":
    os.environ.update(VQLDM_FAST="1", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    sys.path.insert(0, str(HERE.parent))
    os.chdir(tempfile.mkdtemp())
    whole()
    answers()
    again()
    core()
    if os.name == "posix":
        interrupted()
    sys.exit(len(BAD))
