"""What tutorial.ipynb shows with: bets, pictures, runs and the second process.

The notebook's first cell imports this module and calls start(). All that must outlive a second run
of that cell stands here: the temporary folder, the process that trains in it, and what a student
has guessed. checks.py, beside it, has the exercises' checks.
"""

import atexit
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import IPython
import matplotlib
import torch
import torch.nn.functional as F
from checks import RIGHTS, NotYet, need, veil
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor
from torchvision.utils import make_grid

import vqldm

FAST = os.environ.get("VQLDM_FAST") == "1"  # the whole page in a minute or two, for its tests
OPEN = FAST or os.environ.get("VQLDM_OPEN") == "1"  # nobody is there, so nothing waits for a guess
TRAIN_VQ = "train-vq --preset tiny --gan-start .5 --lpips-weight 0 --out vq " + (
    "--n-images 88 --epochs 1" if FAST else "--n-images 1024 --codes 256 --epochs 8"
)
TRAIN_LDM = "train-ldm --preset tiny --vq vq --out ldm " + (
    "--epochs 1 --steps 3 --widths 8,16 --batch-size 36" if FAST else "--epochs 80"
)
BLUE, ORANGE, GREEN, PINK = KIND_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
PICTURES = {
    "axes.titlesize": 17,
    "axes.labelsize": 15,
    "xtick.labelsize": 14,
    "ytick.labelsize": 14,
    "legend.fontsize": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=KIND_COLOURS),
}
HOME = Path(vqldm.__file__).resolve().parent
FOLDERS = []  # the student's own and the page's, once start() was called


def start():
    """Go to a temporary folder, which is deleted with the kernel, and prepare pictures and errors.
    If that is done already, nothing changes."""
    if FOLDERS:
        return
    FOLDERS[:] = Path.cwd(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.chdir(FOLDERS[1].name)
    atexit.register(Second.end)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) - 1)))
    matplotlib.rcParams.update(PICTURES)
    vqldm.UserError._render_traceback_ = lambda error: [f"not yet: {refused(error)}"]
    if IPython.get_ipython():
        slips = (KeyboardInterrupt, NameError, SyntaxError, TypeError)
        IPython.get_ipython().set_custom_exc(slips, in_one_line)


# ---- Errors that need no traceback ---------------------------------------------------------------

INTERRUPTED = "interrupted before it was done. Run this cell again"


def in_one_line(shell, kind, error, trace, tb_offset=None):
    """Jupyter asks this how to show some errors. In a cell's own lines many of them are slips, such
    as a guess without quotes, and one line says more than a traceback."""
    *_, (frame, _) = traceback.walk_tb(trace)
    at = (traceback.extract_tb(trace)[-1].line or "").strip()
    own, line = frame.f_globals is shell.user_ns, ""
    if kind is KeyboardInterrupt:
        line = f"not yet: {INTERRUPTED}"
    elif issubclass(kind, SyntaxError) and "bet(" in (error.text or ""):
        return shell._showtraceback(kind, error, ["not yet: a guess in words needs quotes"])
    elif issubclass(kind, SyntaxError):
        return shell.showsyntaxerror()
    elif own and kind is NameError:
        words = "A guess in words needs quotes. If it is no guess, run the cells above first"
        line = f"not yet: {error}. {words}"
    elif own and at.startswith("use(") and "missing" in str(error):
        line = f"not yet: {error}. In use(add_noise) there are no brackets behind add_noise"
    if line:
        error._render_traceback_ = lambda: [line]
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset)


def refused(error):
    """The program's own one-sentence errors, without what they say of the command line."""
    return f"{str(error).split('. ')[0].strip().rstrip('.')}. Train it again, in chapter 0 or 6"


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

# The answers in words, which no cell can compute, so veiled that nobody reads them by accident.
# checks.veil(text) makes and reads them.
ANSWERS = {
    "in strong noise the guesses lie": "jm#wkf#njggof#le#boo#sljmwp",
    "out of forty points come": "nlpwoz#`lsjfp#le#wkf#elqwz",
    "at t = 190 it guesses": "wkf#nfbm#le#wkf#`obpp",
    "you can tell the outline at step": "balvw#25",
    "C, D: which loss shows it?": "@9#wkf#kfog.lvw#olpp/#G9#mlmf",
}
SAID = {}  # {question: [what was guessed or None, what it was]}
ASKED = []  # the questions, the latest one last


def bet(question, guess=...):
    """Take down a guess before the cell draws what it is about. Without one, the cell stops."""
    ASKED.append(question)
    if guess is ... and not OPEN:
        SAID.pop(question, None)
        raise NotYet("first put your guess in the place of the ... in this cell")
    SAID[question] = [None if guess is ... else guess, None]


def was(computed=None):
    """Compare the latest guess with what the cell has computed, or else with ANSWERS."""
    said = SAID[ASKED[-1]]
    said[1] = veil(ANSWERS[ASKED[-1]]) if computed is None else computed
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


def dots(ax, z, colour=PINK, title="", size=7, reach=2.5):
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
        shutil.copy("page.png", FOLDERS[0] / name)


def film(noisy, guesses):
    """Put a walk into the page as it moves: of z_t and its guess every third, in 48 colours."""
    every = range(1, len(noisy), 3)
    pairs = [torch.stack([noisy[i], guesses[i]]) for i in every]
    frames = [
        sheet({"": pair}, (f"step {i + 1}", "its guess"), 350, 2) for i, pair in zip(every, pairs)
    ]
    w, h = frames[0].size
    tall = Image.new("RGB", (w, h * len(frames)))
    for i, frame in enumerate(frames):
        tall.paste(frame, (0, i * h))
    tall = tall.quantize(48, Image.Quantize.MAXCOVERAGE, kmeans=0 if FAST else 2)
    first, *rest = [tall.crop((0, y, w, y + h)) for y in range(0, tall.height, h)]
    times = [400] * len(rest) + [3000]
    first.save("page.png", save_all=True, append_images=rest, duration=times)
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


# ---- Pictures of single cells --------------------------------------------------------------------


def clouds(panels, height=3.4, colour=PINK, size=5, behind=None, marks=None, rows=1):
    """{title: points} -> a panel for each. colour may be a list, of one for each point."""
    fig, places = axes(len(panels) // rows, height, rows)
    for ax, (title, z) in zip(places, panels.items()):
        if behind is not None:
            dots(ax, behind, "#aaaaaa", size=4)
        if marks is not None:
            dots(ax, marks, "black", size=110)
        dots(ax, z, colour, title, size)
    show(fig)


def plot(*panels, height=3.8):
    """Each panel: {label: (x, y)}, settings of its axes, height of a dotted line or None"""
    fig, places = axes(len(panels), height)
    for ax, (lines, settings, dotted) in zip(places, panels):
        for label, (x, y) in lines.items():
            ax.plot([*x], [*y], "o-" if len(panels) == 1 else "-", lw=3, ms=8, label=label)
        if dotted is not None:
            ax.axhline(dotted, color="black", ls=":")
        ax.set(**settings)
        ax.minorticks_off()
        if "legend" not in settings and len(lines) > 1:
            ax.legend(frameon=False)
    show(fig)


def rotation(*degrees):
    """The pair z_t, v is the pair z0, ε, turned by φ."""
    fig, panels = axes(len(degrees), 4.2)
    for ax, phi in zip(panels, degrees):
        abar = torch.tensor(phi).deg2rad().cos().square()
        cos, sin = float(abar.sqrt()), float((1 - abar).sqrt())
        arrows = {"$z_0$": (1, 0), "ε": (0, 1), "$z_t$": (cos, sin), "v": (-sin, cos)}
        for word, (x, y) in arrows.items():
            colour = {"v": ORANGE, "$z_t$": GREEN}.get(word, "#aaaaaa")
            units = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.014}
            ax.quiver(0, 0, x, y, color=colour, **units)
            ax.text(1.14 * x, 1.14 * y, word, ha="center", va="center", fontsize=20)
        noise = "little" if phi < 45 else "much"
        ax.set(title=f"{noise} noise: φ = {phi}°, ᾱ = {abar:.2f}", aspect="equal")
        ax.set(xlim=(-1.3, 1.4), ylim=(-0.2, 1.3))
        ax.set_axis_off()
    show(fig)


def guesses(shown):
    """{t: (z_t, z0_hat)} -> points under noise, grey, and what was guessed, orange"""
    fig, panels = axes(len(shown), 3.7)
    for ax, (t, (z_t, z0_hat)) in zip(panels, shown.items()):
        dots(ax, z_t, "#bbbbbb", size=5)
        dots(ax, z0_hat, ORANGE, f"t = {t}", 7)
        arrows = torch.cat([z_t, z0_hat - z_t], 1)[:30].flatten(1)  # of 30 points
        units = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006, "headwidth": 5}
        ax.quiver(*arrows.T, color=GREEN, **units)
    show(fig, 8)


def paths(panels, kinds, behind):
    """{title: lines (steps,n,2)} -> the first eight lines, from a ring to a dot"""
    fig, places = axes(len(panels), 5.4)
    for ax, (title, lines) in zip(places, panels.items()):
        dots(ax, behind, "#c4c4c4", title, 8, reach=3)
        for i, colour in enumerate(KIND_COLOURS[c] for c in kinds[:8]):
            ax.plot(*lines[:, i].T, "-", color=colour, lw=2.5)
            ax.plot(*lines[0, i], "o", ms=10, mfc="white", color=colour)
            ax.plot(*lines[-1, i], "o", ms=10, color=colour)
    show(fig, 24)


def training(folder):
    """How a stage 2 was trained: its losses, and what it sampled early and at the end"""
    fig, panels = axes(3, 4)
    for key, width in {"loss": 1, "val_loss": 4}.items():
        panels[0].plot(*log_of(folder, key), lw=width, label=key)
    panels[0].set(xlabel="step", ylim=(0.3, 1.1))
    panels[0].legend(frameon=False)
    drawn = sorted(Path(folder).glob("samples_step_*.png"))
    for ax, path in zip(panels[1:], (drawn[0], drawn[-1])):
        row = pil_to_tensor(Image.open(path).convert("RGB"))[:, 14:, 2:]  # 16, below a label
        ax.imshow(torch.cat(row.chunk(4, 2), 1).permute(1, 2, 0))
        ax.set_title(f"sampled at step {int(path.stem[-6:]):,}")
        ax.set_axis_off()
    show(fig, 64)


def bars(panels, strengths):
    """{title: [(outliers in %, length of the arm)] for each strength}. The first one is grey."""
    fig, places = axes(len(panels), 3.8)
    for ax, (title, found) in zip(places, panels.items()):
        heights, words = [a for a, _ in found], [f"{a:.1f} %\n{length:.2f}" for a, length in found]
        ax.bar_label(
            ax.bar(range(4), heights, color=["#999999"] + 3 * [ORANGE]), words, fontsize=13
        )
        ax.set(title=title, xlabel="strength", ylabel="outliers, %", ylim=(0, 12))
        ax.set(xticks=range(len(strengths)), xticklabels=strengths)
    show(fig)


def codebooks(panels):
    """{title: (codes, how often each won, vectors)} -> vectors grey, codes without a win crossed"""
    fig, places = axes(len(panels), 4.4)
    for ax, (title, (codes, won, z)) in zip(places, panels.items()):
        ax.scatter(*z.transpose(0, 1).flatten(1), s=10, color="#cccccc")
        ax.scatter(*codes[won == 0].T, s=70, marker="x", color=ORANGE)
        ax.scatter(*codes[won > 0].T, s=60, color=BLUE)
        used = f"{title}: {(won > 0).sum()} of {len(won)} in use"
        ax.set(title=used, xticks=[], yticks=[], aspect="equal")
    show(fig, 48)


def pictures(panels, height=3.6):
    """{title: image (1,3,H,W) in [-1,1]} -> one beside the other"""
    fig, places = axes(len(panels), height)
    for ax, (title, image) in zip(places, panels.items()):
        ax.imshow(vqldm.to_bytes(image)[0].permute(1, 2, 0))
        ax.set_title(title, va="bottom")
        ax.set(anchor="S")
        ax.set_axis_off()
    show(fig, 128)


def judged(real, fake, folder):
    """What D says of images and of reconstructions, and λ in the training"""
    fig, panels = axes(2, 4)
    for some, name, colour in ((real, "images", GREEN), (fake, "reconstructions", ORANGE)):
        label = f"{name}: {some.mean():.2f}"
        panels[0].hist(some.flatten(), 40, range=(-3, 3), alpha=0.6, color=colour, label=label)
    panels[0].margins(y=0.4)
    hinge = vqldm.hinge_loss(real, fake)
    panels[0].set(title=f"D's numbers, hinge loss {hinge:.2f}", yticks=[])
    panels[0].legend(frameon=False, loc="upper left")
    for key, colour in {} if FAST else {"lam_wanted": "#999999", "lam": ORANGE}.items():
        panels[1].plot(*log_of(folder, key), lw=3, color=colour, label=key)
        panels[1].legend(frameon=False)
    panels[1].set(title="λ in the training, wanted and capped", yscale="log", xlabel="step")
    show(fig)


def attention(image, weights, received, cells):
    """image uint8 (3,H,W), weights (64,64): two cells, where they look, and what all receive"""
    fig, panels = axes(4, 3.4)
    panels[0].imshow(image.permute(1, 2, 0), extent=(0, 8, 8, 0))
    colours = {"orange": ORANGE, "blue": BLUE}
    for ax, (row, column), (name, edge) in zip(panels[1:], cells, colours.items()):
        x, y = column + torch.tensor([0, 1, 1, 0, 0]), row + torch.tensor([0, 0, 1, 1, 0])
        panels[0].plot(x, y, lw=4, color=edge)
        ax.imshow(weights[8 * row + column].view(8, 8), cmap="gray", vmin=0)
        ax.set_title(f"weights of the {name} cell")
    panels[3].imshow(received.view(8, 8, 3))
    panels[0].set_title("two cells")
    panels[3].set_title("what the cells receive")
    for ax in panels:
        ax.set(xticks=[], yticks=[])
    show(fig, 64)


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
    return [*zip(*[(row["step"], row[key]) for row in log if key in row])] or ([], [])


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
            print("$ python vqldm.py", command)
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
