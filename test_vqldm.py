# SPDX-License-Identifier: MIT
"""What vqldm.py promises, as tests, in the order of the program. A test's name is the promise. Its
docstring says why, or how chance is excluded. The strongest are the references. They write both
trainings and the samplers out once more, as plainly as possible, and the program must end with the
same numbers. No network, GPU or data is needed."""

import copy, functools, hashlib, inspect, itertools, json, math, os, re, shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest, torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import vqldm
from vqldm import Diffusion, rng

torch.set_num_threads(1)  # these tensors are small, so more threads would only wait for each other
ORIGINAL = SimpleNamespace(**vars(vqldm))  # what the fixture at_home replaces, as it was
vqldm.parser_of = functools.cache(vqldm.parser_of)  # the dearest part of a short command
state_of = functools.partial(torch.load, weights_only=True)  # a checkpoint's path -> its dict


# ---- Helpers: tensors --------------------------------------------------------------------------
def randn(*shape, key=0):
    """Normal numbers that are the same in each run, whatever ran before."""
    return torch.randn(shape, generator=rng("test", key))


def grads(loss, tensors):
    """The gradients of a loss, whose graph can be used again."""
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def flat(z):
    """(B,d,h,w) -> (B·h·w,d), without a graph."""
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)


def rough(net, std=0.3):
    """The network, with no weight left at zero, so that everything in it is heard."""
    for i, p in enumerate(net.parameters()):
        p.data = std * randn(*p.shape, key=("rough", i))
    return net


def same(a, b):
    """Are two nested dicts of tensors and values equal, bit for bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)


def bytes_of(images):
    """Images as bytes, one for each, which can be compared, or put into a set."""
    return [x.numpy().tobytes() for x in images]


# ---- Helpers: calls, commands, words -----------------------------------------------------------
def recorded(patch, owner, name, before=lambda call: None):
    """-> a list that gains each call of owner.name: its arguments by name, and its result. before
    is called with the arguments alone."""
    function, calls = getattr(owner, name), []
    signature = inspect.signature(function)

    def call_and_record(*a, **how):
        bound = signature.bind(*a, **how)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        before(call)
        call.result = function(*a, **how)
        calls.append(call)
        return call.result

    patch.setattr(owner, name, call_and_record)
    return calls


def cli(*words):
    """A command, run in this process -> its exit status."""
    try:
        return vqldm.main([str(word) for word in words]) or 0
    except SystemExit as e:
        return e.code


@pytest.fixture()
def said(capsys):
    """A function that gives what was printed since it was last called."""
    return lambda: capsys.readouterr().out


@pytest.fixture()
def refused(capsys):
    """A function that runs a command and gives the one sentence with which it ends, status 2."""

    def call(*words):
        capsys.readouterr()
        assert cli(*words) == 2, words
        error = capsys.readouterr().err
        assert re.fullmatch("vqldm: .+\n", error), error
        return error

    return call


# ---- Helpers: where tests run ------------------------------------------------------------------
def plainly(patch, bf16=False):
    """On the CPU, in float32 (or bf16) whatever it is fast at, without LPIPS and without pictures,
    which take most of a tiny run's time."""
    patch.setattr(torch.accelerator, "current_accelerator", lambda **how: None)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    for name in ("draw_rows", "draw_curves"):
        patch.setattr(vqldm, name, lambda path, rows: None)
    patch.setattr(vqldm, "load_lpips", lambda device: None)


@pytest.fixture(autouse=True)
def at_home(request, monkeypatch):
    """Each test runs plainly. One that asks for calm runs in its folder."""
    plainly(monkeypatch)
    if "calm" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("calm").folder)


@pytest.fixture()
def elsewhere(at_home, tmp_path, monkeypatch):
    """tmp_path, an empty folder, in which the test runs, even if it asks for calm."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture()
def lpips(monkeypatch):
    """LPIPS with a random trunk: enough, and without a download."""
    import lpips

    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
    return ORIGINAL.load_lpips(torch.device("cpu"))


# ---- Helpers: a folder of images ---------------------------------------------------------------
def picture(mode="RGB", left="red", right="blue", size=(40, 40)):
    """A PIL image whose halves have these colours."""
    im = Image.new(mode, size, left)
    im.paste(right, (size[0] // 2, 0, *size))
    return im


def fill(folder, names="", colour=(0, 0, 99), size=(40, 40), first=0):
    """Save images in two halves, of which 37 are all different (see numbered) -> folder. If a name
    ends in bmp, its bytes are the same in any version of PIL."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names.split() if isinstance(names, str) else names, first):
        left = tuple(c + i * k % 37 for c, k in zip(colour, (1, 5, 11)))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(left=left, right=colour, size=size).save(folder / name)
    return folder


def bmps(numbers):
    """The names 3.bmp, 4.bmp, … of these numbers."""
    return [f"{i}.bmp" for i in numbers]


def numbered(images, rows=None):
    """Which images of fill they are, by the red of the left half."""
    rows = range(len(images.labels)) if rows is None else rows
    return [int(images.pixels[row][0, 8, 3]) for row in rows]


def classes_of(images):
    """The name of each image's class."""
    return [images.classes[c] for c in images.labels]


@pytest.fixture()
def load(tmp_path):
    """A function that reads a folder (or "synthetic") -> Images, with the cache in tmp_path/cache.
    Further words are settings of VQConfig."""
    return lambda folder, size=16, **how: vqldm.read_images(
        str(folder), vqldm.VQConfig(size=size, **how), tmp_path / "cache"
    )


@pytest.fixture()
def read(tmp_path, load):
    """A function that saves a PIL image under a name, and reads it -> (3,16,16), as integers."""

    def call(im, name, **how):
        im.save(fill(tmp_path / name) / name, **how)
        return load(tmp_path / name).pixels[0].int()

    return call


# ---- Helpers: runs -----------------------------------------------------------------------------
STAGES = {  # 12 steps each
    "vq": "train-vq --lpips-weight 0 --device cpu --size 32 --widths 8,8 --codes 16 "
    "--epochs 3 --data photos --gan-start .4".split(),
    "ldm": "train-ldm --device cpu --vq calm/vq --T 3 --steps 3 --widths 8 "
    "--batch-size 8 --epochs 3".split(),
}


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """A folder with photos of the classes mole and scar (24 and 12 in train, 8 and 4 in val), and
    with both stages, trained undisturbed in calm/vq and calm/ldm. drawn: the calls of draw_rows."""
    folder = tmp_path_factory.mktemp("calm")
    for part, n, colour in (("train", 36, (200, 120, 90)), ("val", 12, (90, 120, 200))):
        kinds = itertools.cycle(("mole", "mole", "scar"))
        names = [f"{part}/{kind}/{i}.bmp" for i, kind in zip(range(n), kinds)]
        fill(folder / "photos", names, colour)
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch)
        drawn = recorded(patch, vqldm, "draw_rows")
        patch.chdir(folder)
        for stage in STAGES:
            train(stage, Path("calm", stage))
    return SimpleNamespace(folder=folder, drawn=drawn)


def train(stage, out, *words):
    """Train a stage as calm's, but for these words, into the folder out -> its checkpoint."""
    assert cli(*STAGES[stage], *words, "--out", out) == 0
    return state_of(Path(out, "last.pt"))


@pytest.fixture()
def copy_of(calm, tmp_path):
    """A function that copies calm's run of a stage to tmp_path/vq or ldm -> that folder. Parts of
    its checkpoint become those that are named, None takes one out, and config is merged."""

    def call(stage, config=None, **parts):
        folder = shutil.copytree(calm.folder / "calm" / stage, tmp_path / stage)
        state = {**state_of(folder / "last.pt"), **parts}
        state["config"].update(config or {})
        torch.save({name: x for name, x in state.items() if x is not None}, folder / "last.pt")
        return folder

    return call
