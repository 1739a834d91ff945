"""What tutorial.ipynb shows with: settings, bets, pictures, runs and the second process.

The notebook's first cell imports this module, so all that must outlive a second run of that cell
stands here: the temporary folder, the process that trains in it, and what a student has guessed.
checks.py, beside it, has the exercises' checks.
"""

import atexit
import contextlib
import copy
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import IPython
import matplotlib
import torch
import torch.nn.functional as F
from checks import OWN, PAGE, RIGHTS, NotYet, check, need, strange_fault, use, veil, yours
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from torchvision.utils import make_grid

import vqldm

__all__ = ["F", "Image", "Path", "contextlib", "copy", "io", "json", "math", "mock", "nn", "torch"]
__all__ += ["vqldm", "FAST", "HOME", "KIND_COLOURS", "MANY", "POINTS", "S", "TEACH", "TRAIN_LDM"]
__all__ += [
    "TRAIN_VQ",
    "OWN",
    "PAGE",
    "check",
    "strange_fault",
    "use",
    "yours",
    "Second",
    "answered",
]
__all__ += ["axes", "bet", "distortions", "dots", "log_of", "move", "run", "save", "sheet", "show"]
__all__ += ["show_file", "strips", "was"]

# ---- Settings. With VQLDM_FAST=1 the whole page runs in a minute, for its tests. -----------------

FAST = os.environ.get("VQLDM_FAST") == "1"
OPEN = FAST or os.environ.get("VQLDM_OPEN") == "1"  # nobody is there, so nothing waits for a guess
TEACH, POINTS, S = (30, 100, 4) if FAST else (2000, 1000, 50)  # training steps, points, steps back
MANY = 100 if FAST else 3000  # points, where a few in a hundred are counted
TRAIN_VQ = "train-vq --preset tiny --gan-start .5 --lpips-weight 0 --out vq " + (
    "--n-images 88 --epochs 1" if FAST else "--n-images 1024 --codes 256 --epochs 8"
)
TRAIN_LDM = "train-ldm --preset tiny --vq vq --out ldm " + (
    "--epochs 1 --steps 3 --widths 8,16 --batch-size 36" if FAST else "--epochs 80"
)
KIND_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]

HOME = Path(vqldm.__file__).resolve().parent
MY_FOLDER = Path.cwd()  # a student's own
FOLDER = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.chdir(FOLDER.name)  # all runs and pictures are written here, and go when the kernel ends
torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) - 1)))
matplotlib.rcParams.update(
    {
        "axes.titlesize": 17,
        "axes.labelsize": 15,
        "xtick.labelsize": 14,
        "ytick.labelsize": 14,
        "legend.fontsize": 15,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=KIND_COLOURS),
    }
)

# ---- Errors that need no traceback ---------------------------------------------------------------

INTERRUPTED = "interrupted before it was done. Run this cell again"


def in_one_line(shell, kind, error, traceback, tb_offset=None):
    """Jupyter asks this how to show an Interrupt, a NameError or a TypeError. In a cell's own lines
    they are slips such as a guess without quotes, and one line says more than a traceback."""
    deepest = traceback
    while deepest.tb_next:
        deepest = deepest.tb_next
    line = ""
    if kind is KeyboardInterrupt:
        line = f"not yet: {INTERRUPTED}"
    elif deepest.tb_frame.f_globals is shell.user_ns and kind is NameError:
        words = "A guess in words needs quotes. If it is no guess, run the cells above first"
        line = f"not yet: {error}. {words}"
    elif deepest.tb_frame.f_globals is shell.user_ns and "missing" in str(error):
        line = f"not yet: {error}. In use(add_noise) there are no brackets behind add_noise"
    if line:
        error._render_traceback_ = lambda: [line]
    shell.showtraceback((kind, error, traceback), tb_offset=tb_offset)


def refused(error):
    """The program's own one-sentence errors, without what they say of the command line."""
    return f"{str(error).split('. ')[0].strip().rstrip('.')}. Train it again, in chapter 0 or 7"


vqldm.UserError._render_traceback_ = lambda error: [f"not yet: {refused(error)}"]
if IPython.get_ipython():
    slips = (KeyboardInterrupt, NameError, TypeError)
    IPython.get_ipython().set_custom_exc(slips, in_one_line)


@contextlib.contextmanager
def one_line():
    """Around the program: an Interrupt, and what the program refuses, become one line."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as end:
            interrupted = getattr(end, "code", 130) == 130
            need(interrupted, refused(said.getvalue().split("vqldm: ")[-1]))
            raise NotYet(INTERRUPTED) from None


# ---- Bets ----------------------------------------------------------------------------------------

# The answers, where no cell computes them, so veiled that nobody reads them by accident.
# checks.veil(text) makes and reads them.
ANSWERS = {
    "in strong noise the guesses lie": "jm#wkf#njggof#le#boo#sljmwp",
    "out of forty points come": "`lsjfp#le#wkf#elqwz",
    "the panel that suffers": "7",
    "the running mean helps half way or at the end?": "kboe#tbz",
    "enough steps for the arms": "23",
    "first below 5 % outliers: linear, cosine or line?": "wkf#ojmf",
    "with c, the arm gets longer or shorter?": "pklqwfq",
    "at t = 190 it guesses": "wkf#nfbm#le#wkf#`obpp",
    "you can tell at step": r";#az#wkf#dvfpp/#13#wl#03#az#y\w",
    "most outliers": "Bodlqjwkn#1",
    "the worse cut, fine or coarse?": "ejmf",
    "A or B ruins PSNR?": "A",
    "C, D: which loss shows it?": "@9#wkf#kfog.lvw#olpp/#G9#mlmf",
}
SAID = {}  # {question: [what was guessed or None, what it was]}


def bet(question, guess=...):
    """Take down a guess before the cell draws what it is about. Without one, the cell stops."""
    SAID.pop(question, None)  # so that the latest question is the last
    if guess is ... and not OPEN:
        raise NotYet("first put your guess in the place of the ... in this cell")
    SAID[question] = [None if guess is ... else guess, None]


def was(computed=None):
    """Compare the latest guess with what the cell has computed, or else with ANSWERS."""
    question, said = list(SAID.items())[-1]
    said[1] = veil(ANSWERS[question]) if computed is None else computed
    if said[0] is not None:
        print(f"you said {said[0]}, it was {said[1]}")


def answered():
    """List the exercises that were answered, and all guesses beside what it was."""
    print(f"{len(RIGHTS)} exercises answered:", ", ".join(RIGHTS) or "none yet")
    for question, (said, answer) in SAID.items():
        if said is not None:
            print(f"{question:48} you said {said!s:20} it was {answer}")


# ---- Pictures ------------------------------------------------------------------------------------


def axes(columns, height=3.4, rows=1):
    """A figure 1,400 pixels wide, for a projector, and a flat list of its axes."""
    dpi = 24 if FAST else 112
    fig = Figure(figsize=(12.5, height * rows), dpi=dpi, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False).flatten()


def show(fig, colours=12):
    """Put a figure into the page. With VQLDM_FAST=1 none is drawn."""
    if not FAST:
        fig.savefig("figure.png")
        put(Image.open("figure.png").convert("RGB"), colours)


def put(im, colours):
    """Put a picture into the page, in few colours, so that the notebook stays small."""
    rounds = 0 if FAST else 2
    im.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=rounds).save("page.png", optimize=True)
    display(IPython.display.Image("page.png"))


def dots(ax, z, colour="#CC79A7", title="", size=7, reach=2.5):
    """Draw points z (n,2,1,1) in a square from -reach to reach."""
    ax.scatter(*z.detach().flatten(1).T, s=size, color=colour, linewidths=0)
    ax.set(title=title, aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    ax.set_axis_off()


def sheet(rows, above=(), width=1400, least=8):
    """{label: uint8 images (n,3,H,W)} -> one picture. Each head in above stands over an equal part
    of the columns, of which there are at least `least`."""
    font, side = ImageFont.load_default(24), next(iter(rows.values())).shape[-1]
    columns = max(least, *map(len, rows.values()))
    zoom = max(1, width // (columns * (side + 1)))
    left = 24 + max(int(font.getlength(label)) for label in rows)
    top = 40 if above else 0
    grids = [make_grid(list(x), columns, 1, pad_value=255).permute(1, 2, 0) for x in rows.values()]
    grids = [g.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy() for g in grids]
    size = left + max(g.shape[1] for g in grids), top + sum(map(len, grids))
    page = Image.new("RGB", size, "white")
    pen, y = ImageDraw.Draw(page), top
    for i, word in enumerate(above):
        each = max(map(len, rows.values())) / len(above)
        pen.text((left + (i + 0.5) * each * (side + 1) * zoom, 20), str(word), 0, font, "mm")
    for label, g in zip(rows, grids):
        page.paste(Image.fromarray(g), (left, y))
        pen.text((left - 12, y + len(g) / 2), label, 0, font, "rm")
        y += len(g)
    return page


def strips(*given, **named):
    """Put sheet(...) into the page."""
    put(sheet(*given, **named), 128)


def save(name):
    """Copy the picture that was shown last into the folder in which the page was started."""
    if not FAST:
        shutil.copy("page.png", MY_FOLDER / name)


def move(frames, milliseconds, colours=48):
    """Put pictures of one size into the page, as one that moves. They share their few colours."""
    w, h = frames[0].size
    tall = Image.new("RGB", (w, h * len(frames)))
    for i, frame in enumerate(frames):
        tall.paste(frame, (0, i * h))
    tall = tall.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=0 if FAST else 2)
    first, *rest = [tall.crop((0, y, w, y + h)) for y in range(0, tall.height, h)]
    first.save("page.png", save_all=True, append_images=rest, duration=milliseconds)
    display(IPython.display.Image("page.png", width=2 * w))  # half as large in the file


def show_file(name, width=1200, part=1, quality=82):
    """Show a picture that a run has written or that comes with the program, or its left part."""
    path = Path(name) if Path(name).exists() else HOME / name
    if not path.exists():
        return print(f"({name} is missing, so there is no picture here)")
    im = Image.open(path).convert("RGB")
    im = im.crop((0, 0, round(im.width * part), im.height))
    if im.width > width or part < 1:
        size = width, round(im.height * width / im.width)
        im = im.resize(size, Image.Resampling.LANCZOS)
    im.save("page.jpg", quality=quality)
    display(IPython.display.Image("page.jpg"))


def distortions(image):
    """image (1,3,64,64) -> {name: it}, shifted, warped, noisy and blurred, all with the squared
    error of the shift. How much to warp, to add or to blur is found by bisection."""
    goal = F.mse_loss(image.roll(1, 3), image)
    grid = F.affine_grid(torch.eye(2, 3)[None], (1, 3, 64, 64), align_corners=False)
    bend = torch.randn(1, 2, 6, 6, generator=vqldm.rng("bend"))
    bend = F.interpolate(bend, (64, 64), mode="bicubic").permute(0, 2, 3, 1)
    grain = torch.randn(image.shape, generator=vqldm.rng("grain"))

    def warp(a):
        return F.grid_sample(image, grid + a * bend, padding_mode="border", align_corners=False)

    def equally(change, low, high):
        for _ in range(20):
            middle = (low + high) / 2
            less = F.mse_loss(change(middle), image) < goal
            low, high = (middle, high) if less else (low, middle)
        return change(middle)

    return {
        "original": image,
        "1 pixel right": image.roll(1, 3),
        "warped": equally(warp, 0, 0.2),
        "noise": equally(lambda a: image + a * grain, 0, 0.5),
        "blur": equally(lambda a: gaussian_blur(image, 31, a), 0.1, 9),
    }


# ---- Runs of the program -------------------------------------------------------------------------


def folder_of(command):
    """The folder that a command names behind --out"""
    return command.split("--out ")[1].split()[0]


class Sieve(io.StringIO):
    """Prints, as soon as they come, the lines that have a word of keep."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.page, self.line = keep, sys.stdout, ""

    def write(self, text):
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if any(word in line for word in self.keep):
                print(line, file=self.page, flush=True)


def run(command, *keep):
    """Run a command of the program in this process, and print its lines with a word of keep."""
    print("$ python vqldm.py", command)
    shutil.rmtree(folder_of(command), ignore_errors=True)  # the program never overwrites a run
    with one_line(), contextlib.redirect_stdout(Sieve(keep)):
        vqldm.main([*command.split(), "--device", "cpu"])


def log_of(folder, key):
    """-> the steps at which a run has logged a value, and its values"""
    log = json.loads(Path(folder, "log.json").read_text())
    return zip(*[(row["step"], row[key]) for row in log if key in row])


class Second:
    """Runs commands of the program, one after the other, in a second process. Interrupt does not
    reach it. It ends with the kernel, even if that is killed, because it reads from a pipe that
    only the kernel holds open."""

    process = None  # there is at most one
    CODE = """
import os, sys, threading

def end_with_kernel():
    os.read(0, 1)  # returns when the pipe is closed
    os._exit(1)

threading.Thread(target=end_with_kernel, daemon=True).start()
import vqldm
for command in sys.argv[1:]:
    vqldm.main([*command.split(), "--device", "cpu"])
"""

    def __init__(self, *commands):
        self.end()  # if the cell was run before
        for command in commands:
            shutil.rmtree(folder_of(command), ignore_errors=True)
        env = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf8", "PYTHONPATH": str(HOME)}
        with open("second.txt", "w") as file:
            Second.process = subprocess.Popen(
                [sys.executable, "-c", self.CODE, *commands],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )

    @staticmethod
    def end():
        """End the process, if there is one."""
        if Second.process:
            Second.process.kill()
            Second.process.wait()

    def said(self):
        """What each command has printed so far. Its last word is "next: ..." """
        return Path("second.txt").read_text("utf8", "replace").split("next:")

    def done(self, i):
        """Is command i done? If not, one line says so, or that the process has ended."""
        if OPEN:
            self.wait(i)
        done = len(self.said()) > i + 1
        if not done:
            self.alive()
            later = "Go on, and run this cell again later. It last said:"
            print("The second process is still training.", later, self.last())
        return done

    def last(self):
        return " ".join(self.said()).strip().rsplit("\n", 1)[-1][-300:] or "nothing"

    def alive(self):
        ended = "the second process has ended. Start it again in chapter 0. It last said:"
        need(Second.process.poll() is None, f"{ended} {self.last()}")

    @one_line()
    def wait(self, i, *keep):
        """Wait until command i is done, and print its lines with a word of keep."""
        sieve, shown, done = Sieve(keep), 0, False
        while not done:
            ended = Second.process.poll() is not None  # asked first, so that no last word is missed
            done = len(self.said()) > i + 1
            text = "".join(self.said()[i : i + 1])
            sieve.write(text[shown:])
            shown = len(text)
            if ended and not done:
                self.alive()
            time.sleep(0 if done else 0.2)


atexit.register(Second.end)
