# SPDX-License-Identifier: MIT
"""Tests of vqldm.py, in the order of its sections. The name of a test is what the program promises.
The strongest are the references in sections 4, 7, 8 and C. They contain both trainings, the sampler
and the rules of what is held out a second time, written as plainly as possible, and must arrive at
the program's numbers. Where a test replaces a part of the program, another test checks that part
itself. No two numbers that could be mistaken for each other are equal, what is skipped has
something good behind it, and every loop over batches has two that differ. No network, no GPU and no
data set is needed. tools/test_tools.py has the tests of the tools, and uses the helpers here."""

import copy, csv, functools, hashlib, inspect, io, itertools, json, math, multiprocessing, os, re
import importlib.util, random, runpy, shlex, shutil, signal, sys
from collections import Counter
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest, torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

import vqldm
from vqldm import Diffusion, rng

HERE = Path(vqldm.__file__).parent
sys.path.append(str(HERE / "tools"))
import baseline, classifier, evaluate, letters, table

TOOLS = {tool.__name__: tool for tool in (baseline, classifier, evaluate, letters, table)}

torch.set_num_threads(1)  # with tensors as small as these, more threads only cost time
ORIGINAL = SimpleNamespace(**vars(vqldm))  # the program before any test replaces a part of it
inspect.getsource = functools.cache(inspect.getsource)  # it reads the whole file for each class
CPU = torch.device("cpu")
state_of = functools.partial(torch.load, weights_only=True)  # the path of a checkpoint -> its dict
assert_equal = functools.partial(assert_close, rtol=0, atol=0)


# ---- Helpers -------------------------------------------------------------------------------------
def randn(*shape, key=0):
    """Normal random numbers, which are the same in every run of the tests."""
    return torch.randn(shape, generator=rng("test", key))


def randomised(net, std=0.3):
    """Give a network random weights. A mistake in a layer that starts at zero would not show."""
    for i, p in enumerate(net.parameters()):
        p.data = std * randn(*p.shape, key=("randomised", i))
    return net


def identical(a, b):
    """Are two values, or two nested dicts of them, equal bit for bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)


def bytes_of(images):
    """The bytes of each image, which can be compared, or put into a set."""
    return [x.numpy().tobytes() for x in images]


def recorded(patch, owner, name, before=lambda call: None):
    """Call before(call), then owner.name -> the list of its calls, with arguments and results."""
    function, calls = getattr(owner, name), []

    def call_and_record(*a, **how):
        bound = inspect.signature(function).bind(*a, **how)
        bound.apply_defaults()
        before(call := SimpleNamespace(**bound.arguments))
        call.result = function(*a, **how)
        calls.append(call)
        return call.result

    patch.setattr(owner, name, call_and_record)
    return calls


def cli(*words):
    """Run a command of the program in this process, or a tool -> its exit status."""
    words = [str(word) for word in words]
    run = functools.partial(vqldm.main, words)
    if words and words[0] in TOOLS:
        run = functools.partial(TOOLS[words[0]].main, words[1:])
    try:
        return run() or 0
    except SystemExit as e:
        return e.code
    finally:
        vqldm.COMMANDS.pop("evaluate", None)  # the tool adds it


@pytest.fixture()
def printed(capsys):
    """A function that returns what has been printed since it was last called."""
    return lambda: capsys.readouterr().out


@pytest.fixture()
def refused(capsys):
    """A function that runs a command, which must end with status 2 -> the only sentence it says."""

    def call(*words):
        capsys.readouterr()
        assert cli(*words) == 2, words
        error = capsys.readouterr().err
        assert re.fullmatch("vqldm: .+\n", error), error
        return error

    return call


def use_plain_cpu(patch, bf16=False):
    """Let the program compute on a CPU, in float32 even where bf16 would be faster (or in bf16),
    without LPIPS, and without its pictures, which would take most of the time of a tiny run."""
    patch.setattr(torch.accelerator, "current_accelerator", lambda **how: None)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    for name in ("draw_rows", "draw_curves"):
        patch.setattr(vqldm, name, lambda path, rows: None)
    patch.setattr(vqldm, "load_lpips", lambda device: None)


@pytest.fixture(autouse=True)
def plain_cpu(request, monkeypatch):
    """Every test uses a plain CPU. One that asks for `trained` runs in the folder that holds it,
    and one that asks for `runs` computes with the precision in which they were trained."""
    bf16 = "runs" in request.fixturenames and request.getfixturevalue("runs").bf16
    use_plain_cpu(monkeypatch, bf16)
    if "trained" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("trained").folder)
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield  # whoever runs the tests, such as nohup or a shell in the background, may ignore these
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture()
def empty_folder(plain_cpu, tmp_path, monkeypatch):
    """tmp_path, in which the test then runs, even if it also asks for `trained`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def random_lpips(patch):
    """LPIPS with a random SqueezeNet, so that nothing is downloaded. What its authors have learned
    comes with its package. It can be made only as the program makes it."""
    import lpips

    def make(net, verbose, cls=lpips.LPIPS):
        torch.manual_seed(0)
        return cls(net=net, verbose=verbose, pnet_rand=True)

    patch.setattr(lpips, "LPIPS", make)
    return ORIGINAL.load_lpips(torch.device("cpu"))


@pytest.fixture()
def lpips(monkeypatch):
    return random_lpips(monkeypatch)


def two_halves(mode="RGB", left="red", right="blue", size=(40, 40)):
    """A PIL image whose left and right half have these colours."""
    im = Image.new(mode, size, left)
    im.paste(right, (size[0] // 2, 0, *size))
    return im


def fill(folder, names="", colour=(0, 0, 99), size=(40, 40)):
    """Make a folder with images of these names -> the folder. The right half of each has the
    colour. In the left half red grows by 1 from image to image, and up to 37 images are all
    different. (BMP files have the same bytes in every version of PIL.)"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names.split() if isinstance(names, str) else names):
        left = tuple(c + i * k % 37 for c, k in zip(colour, (1, 5, 11)))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        two_halves(left=left, right=colour, size=size).save(folder / name)
    return folder


def classes_of(images):
    """The name of the class of each image."""
    return [images.classes[c] for c in images.labels]


@pytest.fixture()
def load(tmp_path):
    """A function that reads a folder (or "synthetic"), with settings of VQConfig -> Images."""
    return lambda data, size=16, **how: vqldm.read_images(
        vqldm.VQConfig(data=str(data), size=size, **how), tmp_path / "run"
    )


@pytest.fixture()
def read(tmp_path, load):
    """A function that saves a PIL image under a name and reads it -> integers (3,16,16)."""
    return lambda im, name, **how: (
        im.save(fill(tmp_path / name) / name, **how) or load(tmp_path / name).pixels[0].int()
    )


STAGES = {  # how the fixture `trained` trains: 12 steps of each stage. No two numbers are equal
    "vq": "train-vq --lpips-weight 0 --size 32 --widths 6,8 --z-dim 4 --codes 16 --batch-size 7 "
    "--epochs 2.8 --data photos --gan-start .4".split(),
    "ldm": "train-ldm --vq trained/vq --T 5 --steps 3 --widths 12 --batch-size 10 "
    "--epochs 4".split(),
}


@functools.cache  # so that two files with tests, each with this fixture, train only once
def both_stages(folder):
    """Make photos in the folder, and train on them -> what the fixture `trained` is."""
    for part, n, colour in (("train", 36, (203, 119, 90)), ("val", 12, (90, 120, 200))):
        kinds = itertools.cycle(("mole", "mole", "scar"))
        names = [f"{part}/{kind}/{i}.bmp" for i, kind in zip(range(n), kinds)]
        fill(folder / "photos", names, colour)
    made = SimpleNamespace(folder=folder, printed={}, validations={})
    with pytest.MonkeyPatch.context() as patch:
        use_plain_cpu(patch)
        made.drawn = recorded(patch, vqldm, "draw_rows")
        patch.chdir(folder)
        for stage in STAGES:
            with redirect_stdout(io.StringIO()) as out:
                log = train(stage, Path("trained", stage))["log"]
            made.printed[stage] = out.getvalue()
            made.validations[stage] = [row for row in log if "val_" in str(row)]
    return made


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with photos of the classes mole and scar (24 and 12 in train, 8 and 4 in val), and
    with both stages, trained on them in trained/vq and trained/ldm. The result has its path, what
    each stage printed, the validations in its log, and all calls of draw_rows."""
    return both_stages(tmp_path_factory.getbasetemp() / "both stages")


def train(stage, out, *words):
    """Train a stage as in `trained`, but for these words, into the folder `out` -> checkpoint."""
    assert cli(*STAGES[stage], *words, "--out", out) == 0
    return state_of(Path(out, "last.pt"))


def copy_stage(trained, to, stage, config=None, **parts):
    """Copy a stage from `trained` to the folder `to` -> the copy. Parts of its checkpoint can be
    replaced, and settings in its config."""
    folder = shutil.copytree(trained.folder / "trained" / stage, to / stage)
    state = {**state_of(folder / "last.pt"), **parts}
    state = {name: part for name, part in state.items() if part is not None}
    state["config"].update(config or {})
    torch.save(state, folder / "last.pt")
    return folder


@pytest.fixture()
def copy_of(trained, tmp_path):
    return functools.partial(copy_stage, trained, tmp_path)


def beside(patch, *others):
    """Let the program believe that it is one of two processes. Each call of all_reduce adds the
    next of these tensors, as if the other process had sent it."""
    others = iter(others)

    def add(x):
        other = torch.as_tensor(next(others))
        assert x.shape == other.shape, "another tensor is averaged"
        x.add_(other)

    patch.setattr(vqldm, "TORCHRUN", True)
    patch.setattr(vqldm, "WORLD", 2)
    patch.setattr(vqldm.dist, "all_reduce", add)


# ---- 1. Blocks -----------------------------------------------------------------------------------
def test_new_blocks_add_nothing():
    """A ResBlock is only its shortcut, emb neither scales nor shifts, and a UNet answers 0."""
    x, emb = randn(2, 8, 4, 4), randn(2, 16)
    narrow, wider = vqldm.ResBlock(8, 8, 16), vqldm.ResBlock(8, 12)
    assert_equal(narrow(x, emb), x)
    assert not narrow.emb(emb).any()
    assert_equal(wider(x), wider.shortcut(x))
    assert_equal(vqldm.AttentionBlock(8)(x), x)
    assert not vqldm.UNet(8, (8, 12), 1)(x, torch.tensor([0, 5])).any()


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_used_only_where_it_is_fast(monkeypatch, has_bf16):
    """On a CPU or an NVIDIA GPU that really has it. Where it is only emulated, it is slow."""
    use_plain_cpu(monkeypatch, has_bf16)
    emulated = "torch.cuda.is_bf16_supported"
    monkeypatch.setattr(emulated, lambda including_emulation=True: has_bf16 or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (dtype, enabled))
    for kind, fast in {"cpu": has_bf16, "cuda": has_bf16, "mps": False}.items():
        x = SimpleNamespace(device=torch.device(kind))
        assert vqldm.mixed_precision(x) == (torch.bfloat16, fast), kind


def res(block, x, emb):
    """A ResBlock written out. emb scales and shifts what the second norm puts out (AdaGN)."""
    y = block.norm2(block.conv1(F.silu(block.norm1(x))))
    if emb is not None:
        scale, shift = block.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)
        y = y + scale * y + shift
    return block.shortcut(x) + block.conv2(F.silu(y))


def attention(block, x):
    """An AttentionBlock, computed by torch's own module with the same weights."""
    torchs = nn.MultiheadAttention(x.shape[1], 1, batch_first=True)
    weights = block.qkv.weight, block.qkv.bias, block.out.weight, block.out.bias
    torchs.load_state_dict(dict(zip(torchs.state_dict(), weights, strict=True)))
    y = block.norm(x).flatten(2).transpose(1, 2)  # (B,N,C)
    return x + torchs(y, y, y)[0].transpose(1, 2).view_as(x)


def test_attention_weights_the_values_of_all_cells():
    """Its weights are strong here, or else each cell would get nearly the mean of all."""
    block, x = randomised(vqldm.AttentionBlock(8), 1), randn(2, 8, 3, 5)
    assert_close(block(x), attention(block, x), rtol=1e-4, atol=1e-4)
    assert (block(x) - x).std((2, 3)).min() > 1


def written_out(net, y, emb=None):
    """An encoder, decoder or UNet, written out from its layers as in Table 7 of the VQGAN paper. In
    a UNet, which has emb, each UpBlock also gets what the DownBlock had before halving."""
    skips, y = [], net.first(y)
    for block in getattr(net, "down", ()):
        skips.append(res(block.res2, res(block.res1, y, emb), emb))
        y = block.down(skips[-1])
    y = res(net.mid.res2, attention(net.mid.attention, res(net.mid.res1, y, emb)), emb)
    for block in getattr(net, "up", ()):
        up = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if isinstance(block.up, nn.ConvTranspose2d):
            up = F.conv_transpose2d(y, *block.up.parameters(), stride=2, padding=1)
        y = up if emb is None else torch.cat([up, skips.pop()], 1)
        y = res(block.res2, res(block.res1, y, emb), emb)
    return net.last(F.silu(net.norm(y)))


# ---- 2. Stage 1: the VQGAN -----------------------------------------------------------------------
# What the codebook does in training is part of the reference of section 4.
@pytest.mark.parametrize("upsample, widths", [("nearest", (8, 12)), ("transposed", (4, 8, 12))])
def test_encoder_and_decoder_are_made_of_the_papers_blocks(upsample, widths):
    """The grids are not square, so rows and columns cannot be confused. Each width halves them."""
    cfg = vqldm.VQConfig(size=48, widths=widths, codes=5, z_dim=2, upsample=upsample)
    net, f = randomised(vqldm.VQGAN(cfg), 0.2), 2 ** len(widths)
    x, z = randn(2, 3, 16, 24), randn(2, 2, 16 // f, 24 // f)
    for part, y, out in ((net.encoder, x, z), (net.decoder, z, x)):
        assert_close(part(y), written_out(part, y), rtol=1e-4, atol=1e-3)
        assert part(y).shape == out.shape
    assert ("ConvTranspose2d" in repr(net.decoder)) == (upsample == "transposed")
    assert net.latent_shape == (2, 48 // f, 48 // f)


def test_the_default_networks_have_as_many_weights_as_ever_and_norms_of_one_group():
    """A checkpoint fits no others, and the other tests take layers from the program."""
    vqgan, unet = vqldm.VQGAN(vqldm.VQConfig()), vqldm.UNet(3, (64, 128), 4)
    assert sum(p.numel() for p in vqgan.parameters()) == 568_246
    assert sum(p.numel() for p in unet.parameters()) == 2_725_763
    norms = [x for x in [*vqgan.modules(), *unet.modules()] if isinstance(x, nn.GroupNorm)]
    assert len(norms) == 50 and {norm.num_groups for norm in norms} == {1}


def test_nearest_finds_the_code_that_a_search_in_float64_finds(monkeypatch):
    """Even where networks compute in bf16. A vector that was looked up is its own nearest code."""
    use_plain_cpu(monkeypatch, bf16=True)
    book, z = randomised(vqldm.Codebook(5000, 4), 1), randn(4, 4, 8, 8, key=2)
    e, k = book.embedding.weight.detach(), book.nearest(z)
    vectors = z.double().movedim(1, -1).flatten(0, 2)  # (B·h·w,d)
    distance = (vectors[:, None] - e.double()).square().sum(2)
    excess = distance.gather(1, k.flatten()[:, None])[:, 0] - distance.amin(1)
    assert excess.max() < 1e-5 and k.shape == (4, 8, 8)
    z_q = book.lookup(k)
    assert_equal(z_q.movedim(1, -1), e[k])
    assert_equal(book.nearest(z_q), k)
    assert z_q.is_contiguous()  # a Mac's GPU was slow with the other layout


def test_codes_without_a_win_restart_beside_outputs_of_the_encoder():
    """Each new vector is close to one of the outputs: within a tenth of their spread, although one
    channel spreads a thousand times as far as another. No two are equal, they come from the whole
    batch, and the other codes stay. Then wins count from zero. A single output will do as well."""
    book, dead = randomised(vqldm.Codebook(64, 4), 1), torch.arange(64) % 3 == 0
    before, e = book.embedding.weight.detach().clone(), book.embedding.weight.data
    book.wins[~dead] = torch.arange(1.0, 43)
    z = (100 + randn(2, 4, 6, 6)) * torch.tensor([1, 10, 100, 1000]).view(-1, 1, 1)
    book.restart_unused(z, rng(0))
    assert_equal(e[~dead], before[~dead])
    outputs, new = z.movedim(1, -1).flatten(0, 2).double(), e[dead].double()
    far, chosen = torch.cdist(new / outputs.std(0), outputs / outputs.std(0)).min(1)
    assert far.max() < 0.1
    assert chosen.min() < 10 and chosen.max() > 61  # of 72 outputs
    assert len(new.unique(dim=0)) == len(new) and not book.wins.any()
    book.restart_unused(randn(1, 4, 1, 1), rng(0))
    assert book.embedding.weight.isfinite().all()
    book.wins.fill_(1)  # so none restarts
    book.restart_unused(z, rng(0))
    assert not book.wins.any()


# ---- 3. Stage 1: the losses ----------------------------------------------------------------------
# The hinge loss, and how lam enters the generator's loss, are part of the reference of section 4.
def test_the_discriminator_gives_a_logit_for_each_patch():
    """The last convolution gives it, and no sigmoid follows."""
    for widths, channels in (((80, 8), [3, 40, 80, 1]), ((8, 8, 8), [3, 32, 64, 128, 1])):
        disc, x = randomised(vqldm.PatchDiscriminator(widths)), randn(2, 3, 96, 96)
        weights, y, f = iter(disc.parameters()), x, 2 ** len(widths)
        for c_in, c in itertools.pairwise(channels):
            weight, bias = next(weights), next(weights)
            last = c == 1
            assert weight.shape == ((1, c_in, 3, 3) if last else (c, c_in, 4, 4))
            y = F.conv2d(y, weight, bias, stride=1 if last else 2, padding=1)
            if c_in > 3 and not last:
                y = F.group_norm(y, 1, next(weights), next(weights))
            y = y if last else F.leaky_relu(y, 0.2)
        assert not list(weights)  # the network has no further weights
        assert_close(disc(x), y, rtol=0, atol=1e-3 * float(y.detach().abs().max()))
        assert y.shape == (2, 1, 96 // f, 96 // f) and y.abs().max() > 1


@pytest.mark.parametrize("limit", [0.25, 3.0])
def test_lam_is_the_ratio_of_two_gradients_up_to_its_limit(monkeypatch, limit):
    """Gradients are averaged over processes before their lengths are taken: (3, 0) and (0, 4) have
    a mean of length 2.5, (0, 1) and (0, 2) one of length 1.5. Both results are constants."""
    last = torch.zeros(2, requires_grad=True)
    beside(monkeypatch, [0, 4.0], [0, 2.0])
    wanted, lam = vqldm.adaptive_weight(3 * last[0], last[1], last, limit)
    assert float(wanted) == pytest.approx(2.5 / (1.5 + 1e-4))
    assert float(lam) == min(float(wanted), limit)
    assert not wanted.requires_grad and not lam.requires_grad


# ---- 4. Stage 1: training ------------------------------------------------------------------------
def symmetries(x):
    """The eight symmetries of an image (3,H,H), by NumPy."""
    return [np.rot90(y, k, (1, 2)) for y in (x, np.flip(x, 2)) for k in range(4)]


def test_augment_shows_images_in_the_eight_symmetries_of_a_square():
    """0 leaves an image as it is, and 4 mirrors left and right."""
    x, turns = randn(8, 3, 5, 5), torch.arange(8)
    for image, shown in zip(x.numpy(), vqldm.augment(x, turns).numpy()):
        assert sum(np.array_equal(shown, a) for a in symmetries(image)) == 1
    every = vqldm.augment(x[:1].expand(8, -1, -1, -1), turns)
    assert len(every.unique(dim=0)) == 8
    assert_equal(every[0], x[0])
    assert_equal(every[4], x[0].flip(2))


def test_a_step_follows_the_clipped_mean_gradient_or_none_if_it_is_not_finite(monkeypatch, printed):
    """The gradient is (.2, .4) here, and given in each row for the other process. Three optimisers
    have the rates .5, .3 and .2, so with the factor 1 a step is as long as the mean gradient, but
    at most 1. The factor always refers to the first rates. x is not net's and gets no gradient."""
    net, x = nn.Linear(2, 1, bias=False), torch.tensor([0.2, 0.4], requires_grad=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr) for lr in (0.5, 0.3, 0.2)]
    want = net.weight.detach().clone()
    for scale, other, factor, step in (
        (1, [0.4, 0.4], 0.5, [0.15, 0.2]),
        (math.inf, [0.4, 0.4], 0.5, [0, 0]),
        (1, [math.nan, 0.4], 0.5, [0, 0]),
        (1, [0.4, 0.4], 1.0, [0.3, 0.4]),
        (1, [59.8, 79.6], 1.0, [0.6, 0.8]),  # the mean is (30, 40), of length 50
    ):
        beside(monkeypatch, [other])
        vqldm.descend(scale * net(x).sum(), net, factor, *optimizers)
        want -= torch.tensor(step)
        assert_close(net.weight.detach(), want, rtol=0, atol=1e-4)
        assert x.grad is None
        assert ("WARNING a gradient is not finite" in printed()) == (not any(step))


def test_a_run_that_has_diverged_is_ended(trained, tmp_path, monkeypatch, refused):
    """After 20 bad gradients in a row. A good one begins the count anew. Its files are whole."""
    shown = itertools.chain([1] * 9, [math.nan] * 19, [1], itertools.repeat(math.nan))
    augment = vqldm.augment
    monkeypatch.setattr(vqldm, "augment", lambda x, turns: augment(x, turns) * next(shown))
    words = *STAGES["vq"], "--epochs", 14, "--gan-weight", 0, "--out", tmp_path
    assert "20 bad gradients in a row" in refused(*words)
    state = vqldm.load_checkpoint(tmp_path, "", "vq")
    assert (state["step"], state["steps"]) == (48, 60) and next(shown) is math.nan
    assert all(part.isfinite().all() for part in state["model"].values())


def test_learning_rates_rise_for_50_steps_and_fall_to_a_hundredth():
    points = (0, 0.0), (49, 0.1), (99, 0.2), (99, 0.7), (999, 0.999)
    factors = [vqldm.lr_factor(step, progress) for step, progress in points]
    assert factors == pytest.approx([0.02, 1, 1, 0.5, 0.01])


# The references here and in 7 and 8 use the program's layers and Muon, which other tests check,
# and draw random numbers by the same keys. They share none of its loops. 16 runs have all pairs of
# values of these settings, and ten steps in each stage. (In the first one, stage 1 has 52 steps.)
CONFIGS = {"vq": vqldm.VQConfig, "ldm": vqldm.LDMConfig}
SAME = {  # what all runs have. No number is the default, or equal to another one
    "vq": dict(size=32, n_images=23, held_out=0.29, seed=36, widths=(4, 8), z_dim=5, codes=500)
    | dict(commit_weight=0.3, lr=5e-4, codes_lr=0.003, d_lr=2e-3),
    "ldm": dict(T=26, widths=(8, 12), lr=0.01, seed=6),
}
CHOSEN = {  # a setting, its values, and which of them run 0 has, run 1, and so on
    "vq bf16": ((False, True), "0101101001010011"),  # is it fast on this CPU?
    "vq upsample": (("nearest", "transposed"), "1010101000110001"),
    "vq augment": (("all", "mirror", "none"), "1200211202110201"),
    "vq lpips_weight": ((0, 0.5), "1010010111000101"),
    "vq gan_weight": ((0, 0.4), "1111001111110110"),
    "vq gan_start": ((0, 0.3, 0.6), "2011122002012120"),  # these are steps 0, 3 and 6 of ten
    "vq lam_max": ((0.006, 1e4), "1010101010011100"),
    "vq muon_lr": ((0, 0.005), "0101110011000111"),
    "vq batch_size": ((4, 20), "0101011010110010"),  # there are 16 images to train on
    "vq cut": ((False, True), "0110011000100000"),  # do its epochs end within a batch?
    "vq stop": ((None, 3), "0101011011010111"),  # after how many steps it is stopped, and resumed
    "ldm upsample": (("nearest", "transposed"), "0110011011001100"),
    "ldm unconditional": ((False, True), "0011001100000001"),
    "ldm balance": ((False, True), "1010100110011101"),
    "ldm target": (("v", "eps"), "1000110110100100"),
    "ldm schedule": (("cosine", "linear"), "0110010100111011"),
    "ldm ema": ((0.3, 0.995), "1001101010111100"),
    "ldm batch_size": ((5, 20), "1001010011011100"),
    "ldm muon_lr": ((0, 0.003), "1001101110111000"),
    "ldm cut": ((False, True), "0110110001110101"),
    "ldm stop": ((None, 3), "0110011010011010"),  # young follows ema in steps 0 and 1
    "ldm eta": ((0.0, 0.7, 1.0), "0122101012200122"),
    "ldm autoguidance": ((1.0, 1.7), "0110101001010011"),
    "ldm class_guidance": ((1.0, 2.5), "0101100110010011"),
    "ldm steps": ((7, 26), "0101011100001011"),
}


def chosen(i):
    """-> {setting: value} of run i."""
    return {name: values[int(which[i])] for name, (values, which) in CHOSEN.items()}


def that_matter(settings):
    """Those of some settings that change anything, given the others."""
    without_gan = {"vq gan_start", "vq lam_max"} if settings.get("vq gan_weight") == 0 else set()
    one_class = {"ldm class_guidance"} if settings.get("ldm unconditional") else set()
    return [one for one in settings.items() if one[0] not in without_gan | one_class]


def test_the_references_have_all_pairs_of_values_of_their_settings():
    """Pairs in which both settings matter. And they have each alternative of each setting."""
    pairs = functools.partial(itertools.combinations, r=2)
    there = {pair for i in range(16) for pair in pairs(that_matter(chosen(i)))}
    every = pairs([(name, value) for name, (values, _) in CHOSEN.items() for value in values])
    apart = [pair for pair in every if pair[0][0] != pair[1][0]]
    assert [pair for pair in apart if len(that_matter(dict(pair))) == 2 and pair not in there] == []
    for stage, cls in CONFIGS.items():
        kinds = {f.name: (False, True) if f.type is bool else get_args(f.type) for f in fields(cls)}
        for name in kinds.keys() - {"preset", "resume"}:
            assert kinds[name] in ((), CHOSEN.get(f"{stage} {name}", [()])[0]), name


def configs(i, folder):
    """-> the settings of both stages in run i."""
    made = []
    for stage, cls in CONFIGS.items():
        own = [(name.split()[1], x) for name, x in chosen(i).items() if name.split()[0] == stage]
        how = {**SAME[stage], **dict(own), "vq": str(folder / "vq"), "out": str(folder / stage)}
        images = how["batch_size"] * (52 if (stage, i) == ("vq", 0) else 10)
        how["epochs"] = (images - how["cut"] * how["batch_size"] * 3 // 4) / 16
        made.append(cls(**{name: x for name, x in how.items() if hasattr(cls, name)}))
    return made


class Runs(SimpleNamespace):
    def __repr__(self):  # pytest would write out all tensors
        return self.name


@pytest.fixture(scope="module", params=range(16), ids="run {}".format)
def runs(request, tmp_path_factory):
    """Both stages, trained by the program in one of the runs above, with all that it did in each
    step. It validates only at the end, as ten times would take long."""
    i, end_step, descend = request.param, vqldm.Run.end_step, vqldm.descend
    runs = Runs(name=f"run {i}", bf16=chosen(i)["vq bf16"], did={})
    runs.vq_cfg, runs.cfg = configs(i, tmp_path_factory.mktemp("runs"))

    def end_and_perhaps_stop(run, losses):
        if run.step + 1 == chosen(i)[f"{run.cfg.stage} stop"]:
            run.signal = INT
        return end_step(run, losses) and run.step == run.steps

    def descend_and_record(loss, net, factor, *optimizers):
        descend(loss, net, factor, *optimizers)
        after = {name: (p.grad.clone(), p.detach().clone()) for name, p in net.named_parameters()}
        runs.did.setdefault(type(net).__name__, []).append((factor, float(loss.detach()), after))

    with pytest.MonkeyPatch.context() as patch:
        use_plain_cpu(patch, runs.bf16)
        lpips = (lambda device: error_of_means) if runs.vq_cfg.lpips_weight else None
        patch.setattr(vqldm, "load_lpips", lpips)
        patch.setattr(vqldm.Run, "end_step", end_and_perhaps_stop)
        patch.setattr(vqldm, "descend", descend_and_record)
        losses = recorded(patch, Diffusion, "loss")
        encoded = recorded(patch, vqldm, "encode_images")
        for train, cfg in ((vqldm.train_vq, runs.vq_cfg), (vqldm.train_ldm, runs.cfg)):
            with suppress(SystemExit):
                train(cfg, CPU)
            if chosen(i)[f"{cfg.stage} stop"]:
                train(cfg, CPU, vqldm.load_checkpoint(cfg.out, "--resume", cfg.stage))
    runs.vq, runs.ldm = [vqldm.load_checkpoint(c.out, "", c.stage) for c in (runs.vq_cfg, runs.cfg)]
    runs.model = vqldm.restore_ldm(runs.ldm, CPU)
    runs.held_losses = losses[-1].result  # one for each held-out image
    runs.k, runs.k_val = [call.result.long() for call in encoded[-2:]]  # (n,V,h,w)
    return runs


def drawn_images(cfg):
    """-> all drawn images in [-1,1], the rows to train on, and the held-out rows."""

    def content(i):
        name = f"{cfg.seed} {list(vqldm.LESIONS)[i % 4]}/{i}"
        return vqldm.digest(hashlib.sha256(name.encode()).digest())

    images = torch.stack([vqldm.synthetic(i, cfg.size, cfg.seed) for i in range(cfg.n_images)])
    held = torch.tensor([content(i) % 10_000 < 10_000 * cfg.held_out for i in range(cfg.n_images)])
    val = held.nonzero()[:, 0]
    val = val[torch.randperm(len(val), generator=rng("held out"))]
    return images.float() / 127.5 - 1, (~held).nonzero()[:, 0], val


def steps_of(cfg, train):
    """Yield for each step its number, its rows, the progress, and the factor of the rates."""
    orders = [torch.randperm(len(train), generator=rng(cfg.seed, "order", i)) for i in range(20)]
    rows = train[torch.cat(orders)].split(cfg.batch_size)
    n = math.ceil(len(train) * cfg.epochs / cfg.batch_size)
    for i in range(n):
        progress = i / n
        yield i, rows[i], progress, max(0.01, min(1, (i + 1) / 50, (1 - progress) / 0.6))


def adam(params, betas=(0.9, 0.99)):
    return torch.optim.Adam(params, 0.0, betas, fused=True)


def step_along(runs, step, net, loss, rates, factor):
    """One step of each optimiser in rates, which is {optimiser: learning rate}. The first of its
    quantities that differs from the program's is named. Then net gets the program's weights."""
    kind, params = type(net).__name__, dict(net.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    for p, g in zip(params.values(), torch.autograd.grad(loss, [*params.values()])):
        p.grad = torch.empty_like(p).copy_(g)  # fused Adam wants the memory layout of p
    nn.utils.clip_grad_norm_(params.values(), 1.0)
    for optimizer, lr in rates.items():
        optimizer.param_groups[0]["lr"] = factor * lr
        optimizer.step()

    other = f"{runs.name}, step {step}: the program has another {{}} of the {kind}".format
    assert runs.did.get(kind), other("number of steps")
    factor_there, loss_there, after = runs.did[kind].pop(0)
    assert loss_there == pytest.approx(float(loss.detach()), rel=1e-4), other("loss")
    off = 0.1 if runs.bf16 else 0.001
    for name, p in params.items():
        far, length = float((after[name][0] - p.grad).norm()), float(p.grad.norm())
        assert far <= off * length + 1e-6, other(f"gradient of {name}")
    assert factor_there == pytest.approx(factor), other("factor of the learning rates")
    for name, p in params.items():
        far, length = [float((p - one).detach().norm()) for one in (after[name][1], before[name])]
        assert far <= off * length + 1e-6, other(f"step of the weight {name}")
        p.data.copy_(after[name][1])


def rates_of(cfg, *nets):
    """Muon, if it has a rate, moves the kernels inside the networks. Adam moves the rest."""
    ends = {p for net in nets for layer in (net.first, net.last) for p in layer.parameters()}
    params = [p for net in nets for p in net.parameters()]
    kernels = [p for p in params if cfg.muon_lr and p.dim() == 4 and p not in ends]
    rest = [p for p in params if p not in {*kernels}]
    return {adam(rest): cfg.lr, vqldm.Muon(kernels, 0.0): cfg.muon_lr}


def error_of_means(x_hat, x):
    """Takes the place of LPIPS: the squared error of 4×4 means. It must be called in float32."""
    assert not torch.is_autocast_enabled("cpu")
    return F.avg_pool2d(x_hat.float() - x, 4).square().mean((1, 2, 3))


TURNS = {"all": torch.arange(8), "mirror": torch.tensor([0, 4]), "none": torch.tensor([0])}


def plain_vq(runs):
    """Stage 1 written out -> VQGAN, how many codes restarted last, and the end of the log."""
    cfg = runs.vq_cfg
    images, train, val = drawn_images(cfg)
    torch.manual_seed(cfg.seed)
    net, disc = vqldm.VQGAN(cfg), vqldm.PatchDiscriminator(cfg.widths)
    for part in (net, disc):
        part.to(memory_format=torch.channels_last)  # so that rounding is the same
    book, last, log = net.codebook, net.decoder.last.weight, {}
    rates = rates_of(cfg, net.encoder, net.decoder) | {adam([book.embedding.weight]): cfg.codes_lr}
    rates_d = {adam(disc.parameters(), (0.5, 0.9)): cfg.d_lr}
    for i, rows, progress, factor in steps_of(cfg, train):
        if i % 50 == 0:
            restarts = int((book.wins == 0).sum())
            book.restart_unused(net.encoder(images[rows]), rng(cfg.seed, "restart", i))
        turns = TURNS[cfg.augment]
        chosen = torch.randint(len(turns), (len(rows),), generator=rng(cfg.seed, "turns", i))
        x = vqldm.augment(images[rows], turns[chosen])

        z = net.encoder(x)
        k = book.nearest(z)
        code = book.lookup(k)
        x_hat = net.decoder(z + (code - z).detach())
        rec = mse = F.mse_loss(x_hat, x)
        codebook, commit = F.mse_loss(code, z.detach()), F.mse_loss(z, code.detach())
        values = dict(mse=mse, codebook=codebook)
        if cfg.lpips_weight:
            values["lpips"] = error_of_means(x_hat, x).mean()
            rec = mse + cfg.lpips_weight * values["lpips"]
        loss = rec + codebook + cfg.commit_weight * commit
        gan_on = cfg.gan_weight > 0 and progress >= cfg.gan_start
        if gan_on:
            real, adversarial = disc(x), -disc(x_hat).mean()
            of = functools.partial(torch.autograd.grad, inputs=last, retain_graph=True)
            wanted = of(rec)[0].norm() / (of(adversarial)[0].norm() + 1e-4)
            lam = wanted.clamp(max=cfg.lam_max)
            loss = loss + cfg.gan_weight * lam * adversarial
        step_along(runs, i, net, loss, rates, factor)
        book.wins += torch.bincount(k.flatten(), minlength=cfg.codes)

        if gan_on:
            fake = disc(x_hat.detach())
            d_loss = F.relu(1 - real).mean() / 2 + F.relu(1 + fake).mean() / 2
            step_along(runs, i, disc, d_loss, rates_d, factor)
            values.update(d_loss=d_loss, d_real=real.mean(), d_fake=-adversarial)
            values.update(lam=lam, lam_wanted=wanted)
        log = values if i % 10 == 9 else log
    x = images[val]
    with torch.no_grad():
        k = book.nearest(net.encoder(x))
        x_hat = net.decoder(book.lookup(k)).clamp(-1, 1)
    mse, p = (x_hat - x).square().mean((1, 2, 3)), torch.bincount(k.flatten()) / k.numel()
    log.update(val_mse=mse.mean(), val_psnr=(10 * (4 / mse).log10()).mean())
    if cfg.lpips_weight:
        log.update(val_lpips=error_of_means(x_hat, x).mean())
    log.update(val_codes_used_percent=100 * (p > 0).sum() / cfg.codes)
    log.update(val_perplexity=(-torch.special.xlogy(p, p).sum()).exp())
    return net, restarts, {name: float(value.detach()) for name, value in log.items()}


def test_reference_stage_1_goes_the_programs_way_to_its_weights_and_log(runs):
    """If one rate, row, turn, loss or restart were wrong, a loss, a gradient or a step would be
    another."""
    net, restarts, log = plain_vq(runs)
    assert not runs.did["VQGAN"] and not runs.did.get("PatchDiscriminator"), "more steps there"
    assert_close(runs.vq["model"], dict(net.state_dict()), rtol=0, atol=0)
    assert all(p.grad.any() for p in net.parameters())  # so every weight has really moved
    assert 0 < restarts < 500 if runs.name == "run 0" else restarts == 500
    assert runs.vq["lpips"] == (runs.vq_cfg.lpips_weight > 0)  # a resumed run needs it
    rows = runs.vq["log"]
    logged = {**[row for row in rows if "mse" in row][-1], **rows[-1]}
    del logged["step"]
    assert logged == pytest.approx(log, rel=1e-3), runs.name


def test_each_validation_of_stage_1_draws_the_same_images_and_what_became_of_them(trained):
    """There are 18 of them, in several batches. The pictures have the error that is logged."""
    log = trained.validations["vq"]
    drawn = [call for call in trained.drawn if "recon" in call.path.name]
    names = [f"trained/vq/recon_step_{row['step']:06}.png" for row in log]
    assert [str(call.path) for call in drawn] == names and len(names) == 10
    assert len({*bytes_of([call.rows["original"] for call in drawn])}) == 1
    x, x_hat = [vqldm.to_float(drawn[-1].rows[name]) for name in ("original", "reconstruction")]
    assert len(x) == 18 and F.mse_loss(x_hat, x) == pytest.approx(log[-1]["val_mse"], 0.01)


# ---- 5. Stage 2: diffusion -----------------------------------------------------------------------
# predict and sample are part of the reference of section 7, loss and weight of that of section 8.
def betas(T, schedule):
    """β of each level, in float64: linear as in DDPM, but for any T, or cosine."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, T) * 1000 / T
    root = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2)
    return (1 - (root[1:] / root[:-1]) ** 2).clip(max=0.999)


@pytest.mark.parametrize("T", [50, 250, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alpha_bar_is_the_papers_product_and_falls_to_nearly_0(T, schedule):
    """It is computed in float64 and rounded once. Level -1, which comes last, has no noise."""
    alpha_bar = Diffusion(T, schedule).alpha_bar
    want = [*np.cumprod(1 - betas(T, schedule)), 1]
    np.testing.assert_allclose(alpha_bar.double(), want, rtol=1.2e-7)
    assert alpha_bar[-2] < 0.01 and (alpha_bar[:-1].diff() < 0).all()


def test_for_every_S_there_are_exactly_S_evenly_spaced_steps():
    for S in range(1, 1001):
        t, prev = zip(*Diffusion().pairs(S))
        assert len(t) == S and t[0] == 999 and prev == (*t[1:], -1)
        assert {a - b for a, b in zip(t, prev)} <= {1000 // S, 1000 // S + 1}


@pytest.mark.parametrize("T", [1, 3, 50, 1000, 10**6])  # there can't be more
def test_sampling_gives_numbers_at_any_T_eta_and_number_of_steps(T):
    """Roots of what rounding makes negative would be none. Linear ends in noise only if T > 1. With
    eta 0 no noise is drawn."""
    z, schedules = torch.ones(1, 1, 1, 1), ["cosine", "linear"][: 1 + (T > 1)]
    for schedule, eta in itertools.product(schedules, (0.0, 0.5, 1.0)):
        diffusion, noise = Diffusion(T, schedule), (lambda: z) if eta > 0 else None
        for steps in {1, 2, 7, 10, 31, 99, 100} & {*range(T + 1)}:
            walk = diffusion.sample(lambda z_t, t: z_t, z, steps, eta, noise)
            assert [*walk][-1][0].isfinite(), (schedule, eta, steps)


# ---- 6. Stage 2: the UNet ------------------------------------------------------------------------
@pytest.mark.parametrize("upsample, widths", [("nearest", (8, 12)), ("transposed", (8, 4, 12))])
def test_the_unet_has_skips_and_depends_on_time_and_class(upsample, widths):
    """emb is the sum of two things: the time, as sines and cosines with periods of 2π to 2π·10,000
    that pass through two layers, and a learned vector of the class."""
    net, z = randomised(vqldm.UNet(3, widths, 3, upsample), 0.2), randn(4, 3, 8, 16)
    label, t = torch.arange(4), torch.tensor([5, 50, 500, 999])
    angle = t.double()[:, None] / 10_000 ** (torch.arange(16).double() / 16)
    sines = torch.cat([angle.sin(), angle.cos()], 1).float()
    emb = net.time[2](F.silu(net.time[0](sines))) + net.label.weight
    assert_close(net(z, t, label), written_out(net, z, emb), rtol=1e-4, atol=1e-3)
    assert net(z, t, label).shape == z.shape
    assert ("ConvTranspose2d" in repr(net)) == (upsample == "transposed")


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16])
def test_networks_compute_in_bf16_inside_and_answer_in_float32(monkeypatch, inner):
    """The decoder's last layer stays in float32, because lam is computed from its gradients."""
    use_plain_cpu(monkeypatch, bf16=inner == torch.bfloat16)
    x, z, t = randn(2, 3, 16, 16), randn(2, 4, 4, 4), torch.tensor([997, 999])
    with vqldm.mixed_precision(x):
        sines = vqldm.time_embedding(t, 2)
    assert_close(sines.double(), torch.stack([t.double().sin(), t.double().cos()], 1))
    for net, last, *given in (
        (vqldm.Encoder((8, 8), 4), inner, x),
        (vqldm.Decoder((8, 8), 4), torch.float32, z),
        (vqldm.PatchDiscriminator((8, 8)), inner, x),
        (vqldm.UNet(4, (8, 8), 1), inner, z, t),
    ):
        dtypes = []
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda layer, x, y, to=dtypes: to.append(y.dtype))
        assert net(*given).dtype == torch.float32
        assert {*dtypes[:-1]} == {inner} and dtypes[-1] == last


# ---- 7. From noise to images ---------------------------------------------------------------------
def plain_sample(runs, cfg, label, gens):
    """Sampling written out, with DDIM's eq. 12 and 16."""
    d, n_classes = runs.vq_cfg.z_dim, len(runs.ldm["classes"])

    def noise():
        return torch.stack([torch.randn(d, 8, 8, generator=gen) for gen in gens])

    strong, young = [vqldm.UNet(d, runs.cfg.widths, n_classes, runs.cfg.upsample) for _ in range(2)]
    strong.load_state_dict(runs.ldm["ema"])
    young.load_state_dict(runs.ldm["young"])
    unknown = torch.full_like(label, n_classes)
    w, c = cfg.autoguidance, cfg.class_guidance if n_classes > 1 else 1
    z = noise()
    for t, prev in runs.model.diffusion.pairs(cfg.steps):
        a, p = runs.model.diffusion.alpha_bar[[t, prev]]
        with torch.no_grad():
            t_all = torch.full((len(z),), t)
            good, weak = strong(z, t_all, label), young(z, t_all, label)
            vague = strong(z, t_all, unknown)
        out = good + (w - 1) * (good - weak) + (c - 1) * (good - vague)
        eps = out if runs.cfg.target == "eps" else (1 - a).sqrt() * z + a.sqrt() * out
        z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        sigma = cfg.eta * ((1 - p) / (1 - a) * (1 - a / p)).sqrt()
        z = p.sqrt() * z0 + (1 - p - sigma**2).clamp(min=0).sqrt() * eps
        z = z + sigma * noise() if cfg.eta > 0 else z
    return z


def test_reference_sampling_ends_with_the_programs_latents(runs, monkeypatch):
    """The noise of an image depends on its id alone, not on its batch: here the program makes 36
    at once or in batches, and the reference three of them. A guidance of 1 costs no time."""
    use_plain_cpu(monkeypatch)  # in bf16, rounding would depend on the size of the batch
    # a single class has no class guidance, with or without --unconditional
    monkeypatch.setattr(runs.model, "cfg", vqldm.replace(runs.cfg, unconditional=False))
    how = {name: runs.ldm["config"][name] for name in vqldm.SAMPLING}
    cfg = vqldm.SampleConfig(**how, seed=21)  # not that of the training
    young = recorded(monkeypatch, runs.model.young, "forward")
    ids = torch.arange(0, 7001 * 36, 7001)  # torch's integers must do as well as Python's
    label = torch.tensor([2, 0, 1]).repeat(12) % len(runs.ldm["classes"])
    pictures, latents = runs.model.generate(cfg, ids, label)
    assert bool(young) == (cfg.autoguidance != 1)
    some = [33, 4, 9]
    z = plain_sample(runs, cfg, label[some], [rng(21, "sample", 7001 * i) for i in some])
    far = float((latents[some] - z).norm() / z.norm())
    assert far < 1e-4, f"{runs.name}: the program has other latents"
    mean, std = runs.ldm["scale"].view(2, -1, 1, 1)
    vqgan = runs.model.vqgan
    x = vqgan.decode(vqgan.codebook.nearest(latents[some] * std + mean)).clamp(-1, 1)
    assert (pictures[some] - ((x + 1) * 127.5)).abs().max() < 0.51  # pictures are rounded


# ---- 8. Stage 2: training ------------------------------------------------------------------------
def losses_of(cfg, net, z0, t, eps, label):
    """The squared error of v or ε for each image (B,)."""
    a = Diffusion(cfg.T, cfg.schedule).alpha_bar[t].view(-1, 1, 1, 1)
    goal = a.sqrt() * eps - (1 - a).sqrt() * z0 if cfg.target == "v" else eps
    out = net(a.sqrt() * z0 + (1 - a).sqrt() * eps, t, label)
    return (out - goal).square().flatten(1).mean(1)


def plain_ldm(runs):
    """Stage 2 written out (DDPM's Algorithm 1) -> the UNet, the running mean of its weights, young,
    the losses of UNet and mean on held-out images, and the loss that was logged last."""
    cfg, vq_cfg, vqgan = runs.cfg, runs.vq_cfg, runs.model.vqgan
    images, train, val = drawn_images(vq_cfg)
    seed, B, turns = cfg.seed, cfg.batch_size, TURNS[vq_cfg.augment]
    turned = [vqldm.augment(images, [turn] * len(images)) for turn in turns]
    k = torch.stack([vqgan.codebook.nearest(vqgan.encoder(x)) for x in turned], 1)
    for rows, there in ((train, runs.k), (val, runs.k_val)):
        far = (k[rows, : there.shape[1]] != there).float().mean()
        assert far < 0.01, f"{runs.name}: the program has other codes, and not by rounding"
        k[rows, : there.shape[1]] = there
    codes = vqgan.codebook.embedding.weight[k]  # (n,V,h,w,d)
    std, mean = torch.std_mean(codes[train].double().flatten(0, -2), 0, correction=0)
    assert_close(runs.ldm["scale"].double(), torch.stack([mean, std]), rtol=1e-3, atol=1e-4)
    latents = ((codes - mean) / std).float().movedim(-1, 2).detach()  # (n,V,d,h,w)
    n_classes = 1 if cfg.unconditional else 4
    labels = torch.arange(len(latents)) % n_classes
    torch.manual_seed(seed)
    net = vqldm.UNet(vq_cfg.z_dim, cfg.widths, n_classes, cfg.upsample)
    net.to(memory_format=torch.channels_last)
    ema, young, rates = copy.deepcopy(net), None, rates_of(cfg, net)
    for i, rows, progress, factor in steps_of(cfg, train):
        gen = rng(seed, "step", i)
        if cfg.balance:
            chance = 1 / torch.bincount(labels[train])[labels[train]]
            rows = train[torch.multinomial(chance, B, True, generator=gen)]
        turn = torch.randint(len(turns), (B,), generator=gen)
        t = torch.randint(0, cfg.T, (B,), generator=gen)
        eps = torch.randn(B, *latents.shape[2:], generator=gen)
        label = torch.where(torch.rand(B, generator=gen) < 0.1, n_classes, labels[rows])
        loss = losses_of(cfg, net, latents[rows, turn], t, eps, label)
        if i % 10 == 9:
            logged = float(loss.mean().detach())
        if cfg.target == "v":
            a = Diffusion(cfg.T, cfg.schedule).alpha_bar[t]
            loss = loss * (2 * (a * (1 - a)).sqrt()).clamp(min=0.25)
        step_along(runs, i, net, loss.mean(), rates, factor)
        keep = min(cfg.ema, (1 + i) / (10 + i))
        for m, p in zip(ema.parameters(), net.parameters()):
            m.data = keep * m.data + (1 - keep) * p.data
        young = copy.deepcopy(ema) if progress < 0.2 else young
    z0 = latents[val, 0]
    t = torch.linspace(0, cfg.T - 1, len(val)).long()  # each image has another noise level
    eps = torch.randn(z0.shape, generator=rng("held-out noise"))
    of_net, of_mean = [losses_of(cfg, m, z0, t, eps, labels[val]).detach() for m in (net, ema)]
    return net, ema, young, of_net, of_mean, logged


def test_reference_stage_2_goes_the_programs_way_to_its_weights_and_log(runs):
    """A validation takes the loss of the running mean, and the std of 16 samples made in at most
    25 steps."""
    net, ema, young, of_net, of_mean, loss = plain_ldm(runs)
    assert not runs.did["UNet"], "more steps there"
    for part, want in (("model", net), ("ema", ema), ("young", young)):
        for name, p in want.named_parameters():
            other = f"{runs.name}: the program has another {part} {name}"
            assert_close(runs.ldm[part][name], p.detach(), rtol=1e-4, atol=1e-6, msg=other)
    assert all(p.grad.any() for p in net.parameters())  # so every weight has really moved
    rows = runs.ldm["log"]
    assert [row["loss"] for row in rows if "loss" in row][-1] == pytest.approx(loss, 1e-3)
    assert rows[-1]["val_loss"] == pytest.approx(float(of_mean.mean()), rel=2e-4)
    assert_close(runs.held_losses, of_mean, rtol=1e-3, atol=0)
    assert not torch.allclose(runs.held_losses, of_net, rtol=1e-3)
    short = vqldm.replace(runs.cfg, eta=0.0, steps=min(runs.cfg.steps, 25))
    _, z0 = runs.model.generate(short, range(16), torch.arange(16) % len(runs.model.classes))
    assert rows[-1]["val_latent_std"] == pytest.approx(float(z0.std()), rel=1e-3)


@pytest.mark.parametrize("n, turns", [(2500, 8), (2501, 7), (20_001, 1)])
def test_many_images_are_encoded_in_fewer_symmetries(trained, tmp_path, monkeypatch, n, turns):
    """And of those that are held out, here 1,000 or more, the first 256 are measured."""
    encode = Mock(side_effect=[None, KeyboardInterrupt])
    monkeypatch.setattr(vqldm, "encode_images", encode)
    monkeypatch.setattr(vqldm, "read_images", lambda *a: images_with_ids(*[range(n)] * 2))
    assert cli(*STAGES["ldm"], "--out", tmp_path / "ldm") == 130
    (*_, symmetries), (*_, held, _) = [call.args for call in encode.call_args_list]
    assert [*symmetries] == [*range(turns)] and len(held) == 256


def test_a_channel_in_which_all_codes_agree_does_no_harm(copy_of, tmp_path):
    """Its std is 0, and latents are divided by the std."""
    model = state_of("trained/vq/last.pt")["model"]
    model["codebook.embedding.weight"][:, 1] = 7
    state = train("ldm", tmp_path / "new", "--vq", copy_of("vq", model=model), "--epochs", 0.1)
    assert state["scale"][:, 1].tolist() == pytest.approx([7, 1e-6])


def test_stage_2_halves_a_grid_of_12_cells_at_most_twice(copy_of, refused):
    words = "train-ldm", "--vq", copy_of("vq", dict(size=48)), "--widths", "8,8,8"
    assert "--widths: too many halvings" in refused(*words)


def test_stage_2_can_have_images_of_its_own(trained, tmp_path, printed):
    """It learns their classes. What stage 1 has seen is not forgotten."""
    own = fill(tmp_path / "own", "a/0.bmp a/1.bmp b/2.bmp val/a/3.bmp")
    state = train("ldm", tmp_path / "ldm", "--epochs", 1, "--data", own)
    assert state["classes"] == ["a", "b"] and "WARNING" not in printed()
    assert torch.isin(state_of("trained/vq/last.pt")["seen"], state["seen"]).all()


# ---- 9. Sampling ---------------------------------------------------------------------------------
NAMES = ["$m\udcf6le, É", "É"]  # no names of files, and one that was a folder without UTF-8


@pytest.fixture()
def ldm(copy_of, empty_folder):
    """A copy of stage 2 in the folder ldm, with --eta .6 and with classes of these NAMES."""
    return copy_of("ldm", dict(eta=0.6, autoguidance=1.7), classes=NAMES)


TYPED = "--n 5 --class É --eta .2 --steps 2 --autoguidance 4 --class-guidance 3"
AS_TRAINED = ("--n 70", [0.6, 3, 1.7, 1.5], 35 * [0, 1])
AS_TYPED = (TYPED, [0.2, 2, 4, 3], 5 * [1])


@pytest.mark.parametrize("words, how, want", [AS_TRAINED, AS_TYPED])
def test_sample_makes_images_of_all_classes_or_of_one(ldm, monkeypatch, words, how, want):
    """They are made as was recorded, or as is typed."""
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "generate")
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    assert cli("sample", "--ckpt", ldm, "--out", "a/new/folder", *words.split()) == 0
    assert [*drawn[0].rows] == [NAMES[c] for c in sorted({*want})]
    for call in made:
        assert [getattr(call.settings, field.name) for field in fields(vqldm.Sampling)] == how
    assert [int(i) for call in made for i in call.ids] == [*range(len(want))]
    assert [c for call in made for c in call.label.tolist()] == want


def test_samples_can_be_read_as_a_folder_even_if_the_command_is_stopped(ldm, load, monkeypatch):
    """metadata.csv names their classes, which here come in threes, so that 64 are not full rounds.
    It is read before each batch is made: by then the rows of all images so far are on the disk."""
    monkeypatch.setattr(vqldm, "wanted_classes", lambda *a: torch.tensor([0, 1, 1]))
    table, rows = fill(Path("new")) / "metadata.csv", []  # an empty folder may be there
    look = "generate", lambda call: rows.append(table.read_text("utf8").splitlines())
    made = recorded(monkeypatch, vqldm.LatentDiffusion, *look)
    assert cli(*"sample --ckpt ldm --out new --n 70".split()) == 0
    assert rows == [["file_name,class"], table.read_text("utf8").splitlines()[:65]]
    images = load("new", size=32)  # without grid.png, sorted by name, and so by number
    assert_equal(images.pixels[:], torch.cat([call.result[0] for call in made]))
    assert classes_of(images) == (["$m?le, É", "É", "É"] * 24)[:70]
    assert_equal(images.labels, torch.cat([call.label for call in made]))


def test_sample_shows_the_first_64_images_and_their_latents_std(ldm, monkeypatch, printed):
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "generate")
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    assert cli(*"sample --ckpt ldm --out new --n 70 --seed 2".split()) == 0
    images, latents = made[0].result
    assert identical(drawn[0].rows, {NAMES[0]: images[::2], NAMES[1]: images[1::2]})
    std = f"latents' std: {latents.std():.2f} (wrong outside 0.7 to 1.4)"
    assert printed().splitlines()[-1] == f"look at new/grid.png - {std}"
    assert drawn[0].path == Path("new/grid.png")


# ---- A. Reconstructions --------------------------------------------------------------------------
def test_lpips_is_squeezenets_with_its_authors_weights_frozen_and_passes_gradients(lpips):
    """Random weights would have nearly the sum 0. Its dropout must be off."""
    assert "Fire" in repr(lpips) and "Dropout" in repr(lpips)  # only SqueezeNet has Fire
    assert sum(float(p.sum()) for p in lpips.lins.parameters()) == pytest.approx(173.44, abs=0.01)
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not any(m.training for m in lpips.modules())
    x, x_hat = randn(2, 2, 3, 64, 64).requires_grad_()
    assert not lpips(x, x).any()
    assert torch.autograd.grad(lpips(x_hat, x).sum(), x_hat)[0].any()


def test_without_lpips_a_warning_says_what_to_do(monkeypatch, printed):
    """Either its file cannot be fetched, or its package is missing. Then the program goes on."""
    weights = f"{torch.hub.get_dir()}/checkpoints/squeezenet1_1-b8a52dc0.pth"
    for error in (OSError("no network"), ImportError("no lpips")):
        monkeypatch.setattr("lpips.LPIPS", Mock(side_effect=error))
        assert ORIGINAL.load_lpips(torch.device("cpu")) is None
        told = f"WARNING LPIPS is left out ({error!r}). It needs pip install lpips, and {weights}\n"
        assert printed() == told


def test_psnr_stays_a_number_if_there_is_no_error():
    """Infinity would be no JSON. The limit is 10 lg(4/1e-10) = 106 dB. What the decoder gives lies
    beyond [-1,1] here, and is cut off as in pictures."""
    x, k, book = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 1).long(), vqldm.Codebook(1, 3)
    perfect = SimpleNamespace(codebook=book, encode=lambda x: k, decode=lambda k: 2 * x)
    measures, recon = vqldm.reconstruct(perfect, vqldm.to_bytes(x))
    assert measures["psnr"] == pytest.approx(106.02, abs=0.01) and measures["mse"] == 0
    assert vqldm.to_bytes(torch.tensor([-9.0, -1, 1, 9])).tolist() == [0, 0, 255, 255]


# ---- B. Drawn lesions ----------------------------------------------------------------------------
def test_a_drawn_image_follows_from_its_number_and_seed_alone(load):
    """It does not matter in which order images are drawn, or how many. No two are alike."""
    eight, nine = load("synthetic", 24, n_images=8, seed=1), load("synthetic", 24, n_images=9)
    for i in range(7, -1, -1):
        assert_equal(eight.pixels[i], vqldm.synthetic(i, 24, 1))
    assert_equal(load("synthetic", 24, n_images=8).pixels[:], nine.pixels[:8])
    assert len(torch.cat([eight.pixels, nine.pixels]).unique(dim=0)) == 17
    assert len(torch.cat([eight.checksum, nine.checksum]).unique()) == 17


def test_drawn_classes_take_turns_and_look_as_in_readme(load):
    """The numbers and pictures in README belong to these colours and this grain. Whoever changes
    them puts the new numbers here, and measures anew."""
    colours = {  # the mean red, green and blue of each class
        "keratosis-like": [211.70, 165.88, 149.86],
        "melanoma-like": [200.11, 154.88, 143.25],
        "nevus-like": [206.77, 157.23, 143.58],
        "vascular-like": [212.30, 151.99, 146.29],
    }
    images = load("synthetic", size=24, n_images=160)
    assert images.classes == list(colours) and not images.test.any()
    assert images.labels.tolist() == [0, 1, 2, 3] * 40
    pixels = images.pixels[:].float()
    means = pixels.view(40, 4, 3, -1).mean((0, 3))
    assert_close(means, torch.tensor([*colours.values()]), rtol=0, atol=0.03)
    inside, skin = pixels[..., 6:18, 6:18], pixels[..., [0, 1, 2, -3, -2, -1], :]
    grain = [float(part.diff(dim=3).abs().mean()) for part in (inside, skin)]
    larger = load("synthetic", size=64, n_images=16).pixels[:].float()
    grain.append(float(larger.diff(dim=3).abs().mean()))
    assert grain == pytest.approx([16.147, 6.523, 3.871], abs=0.02)


# ---- C. A folder of images: what is held out, and batches ----------------------------------------
def images_with_ids(content, group, test=False):
    """Images with these checksums of content and group, of the classes a and b in turn."""
    i = torch.arange(len(content))
    content, group, test = [torch.as_tensor(part) for part in (content, group, test)]
    return vqldm.Images(i, i % 2, ["a", "b"], content, group, test.bool().expand(len(i)))


# The rules of docs/USING.md once more, in plain Python, for folders that are drawn at random.
PARTS = "train Training val VALID validation Test testing".split()
KINDS = ["Mole", "acne", "latest"]  # the last one ends in test, but is a class
IDS = ["patient_id", "lesion_id", "group"]
WORDS = {"class": ["", "unknown", "Mole", 'acne, "dark"'], **{one: ["", "1", "G,H"] for one in IDS}}


def drawn_folder(draw, folder):
    """Images with names of up to four folders. Some are copies, and some broken. Perhaps there is a
    metadata.csv of some of them -> {name: {column: word}}, without empty words, and its columns."""
    names = [f"{i}.bmp" for i in range(draw.randint(4, 14))]
    names = ["/".join([*draw.choices(PARTS + 3 * KINDS, k=draw.randint(0, 4)), x]) for x in names]
    fill(folder, names)
    for _ in range(draw.randint(0, 3)):
        (folder / draw.choice(names)).write_bytes((folder / draw.choice(names)).read_bytes())
    rows = {name: {} for name in draw.sample(names, draw.randint(3, len(names)))}
    columns = draw.choice([[], ["class"]]) + draw.sample(IDS, draw.randint(0, 1))
    for row in rows.values():
        words = [(column, draw.choice(WORDS[column])) for column in columns]
        row.update({column: word for column, word in words if word})
    if draw.random() < 0.4:
        rows, columns = {name: {} for name in names}, None
    else:
        (folder / "other.csv").write_text("file_name,class\n")  # it is not looked at
        encoding = draw.choice(["utf-8", "utf-8-sig"])
        with (folder / "metadata.csv").open("w", encoding=encoding, newline="") as file:
            table = csv.DictWriter(file, draw.sample(["file_name", *columns], 1 + len(columns)))
            table.writeheader()
            table.writerows([dict(row, file_name=f" {x} ") for x, row in rows.items()] + [{}])
    for name in draw.sample(sorted(rows), draw.choice([0, 0, 2])):
        (folder / name).write_text("no image")
    return rows, columns


@pytest.mark.parametrize("key", range(60))
def test_reference_classes_groups_and_splits_are_those_of_the_rules(tmp_path, load, printed, key):
    """Of folders, tables, copies, any share (at a group's number, and beside it), and whatever an
    earlier training has seen."""
    draw = random.Random(key)
    rows, columns = drawn_folder(draw, folder := tmp_path / "Test")
    data = {name: (folder / name).read_bytes() for name in sorted(rows)}
    names = [name for name in data if data[name] != b"no image"]
    content = [vqldm.digest(hashlib.sha256(data[name]).digest()) for name in names]
    column = (columns or [""])[-1]  # that of the ids, if there is one
    told = any("class" in row for row in rows.values())
    classes, group, test = [], [*content], []
    for i, name in enumerate(names):
        *folders, _ = name.split("/")
        kinds = [one for one in folders if one not in PARTS]
        classes += [rows[name].get("class", "unknown") if told else ["images", *kinds][-1]]
        test += [any(one in PARTS[2:] for one in folders)]
        if column in IDS and column in rows[name]:
            group[i] = vqldm.digest((column, rows[name][column]))
    images = load(folder)
    assert classes_of(images) == classes and images.classes == sorted({*classes})
    assert (images.checksum.tolist(), images.group.tolist()) == (content, group)
    assert images.test.tolist() == test

    at = draw.choice(group) % 10_000
    share = draw.choice([0, 0.3, 0.5, at / 10_000, (at + 0.5) / 10_000])
    seen = {77, *draw.sample(content + group, draw.choice([0, 0, 0, 1, 3]))}
    earlier = torch.tensor(sorted(seen))
    held = [test[i] or group[i] % 10_000 < round(10_000 * share, 1) for i in range(len(names))]
    train = [i for i in range(len(names)) if not held[i]]
    seen |= {one for i in train for one in (content[i], group[i])}
    known = {group[i] for i in range(len(names)) if {content[i], group[i]} & seen}
    val = [i for i in range(len(names)) if group[i] not in known]
    val = [val[i] for i in torch.randperm(len(val), generator=rng("held out"))]
    with nullcontext() if train and val else pytest.raises(vqldm.UserError, match="too few groups"):
        a, b, after = vqldm.split(images, share, earlier)
        assert (a.tolist(), b.tolist(), after.tolist()) == (train, val, sorted(seen))

    n, m = len(rows), sum(column in row for row in rows.values() if column in IDS)
    here = [[classes[i] for i in part] for part in (train, val)]
    counts = [{one: part.count(one) for one in images.classes} for part in here]
    by = Counter(column if column in IDS and column in rows[name] else "image" for name in data)
    lines = {  # what is said, and when
        f"classes by {'class' if told else 'folder'} - images split by {dict(by)}\n": True,
        f"names {n} of {len([*folder.rglob('*.bmp')])} images, and": columns is not None,
        f"images without an id, so maybe trained on and held out: {n - m}\n": 0 < m < n,
        f"data {folder} {len(names)} images in {len({*group})} groups\n": True,
        f"to train on: {len(train)} images: {counts[0]}\n": True,
        f"held out: {len(val)} images: {counts[1]}\n": True,
        **{f"WARNING skipped '{name}' (": name not in names for name in rows},
    }
    said = printed()
    assert {line: line in said for line in lines} == lines


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_holds_out_nothing_that_it_has_seen(copy_of, tmp_path, monkeypatch, stage):
    """Even if photographs were lost, or moved to a folder called val. What it has seen is not
    forgotten, and stage 2 keeps the scale that it has learned."""
    photos, out = shutil.copytree("photos", tmp_path / "all"), copy_of(stage)
    for i, path in enumerate(sorted(photos.glob("train/*/2?.bmp"))):
        path.rename((photos / "val/mole" if i % 2 else tmp_path) / f"moved{i}.bmp")
    splits, before = recorded(monkeypatch, vqldm, "split"), state_of(out / "last.pt")
    words = "--resume", "--data", photos, "--epochs", 7, "--out", out
    assert cli(f"train-{stage}", *words) == 0
    images, (_, val, _), after = splits[0].images, splits[0].result, state_of(out / "last.pt")
    assert len(images.labels) == 43 and len(val) == 17
    assert not torch.isin(images.checksum[val], before["seen"]).any()
    assert_equal(after["seen"], before["seen"])
    assert after["step"] > before["step"] and identical(after.get("scale"), before.get("scale"))


@pytest.mark.parametrize("key", range(40))
def test_reference_the_rows_of_all_steps_are_one_stream_reshuffled_every_epoch(key):
    draw = random.Random(key)
    n, size, step = draw.randint(1, 12), draw.randint(1, 30), draw.randint(0, 40)
    epochs = range(1 + (step + 1) * size // n)
    order = torch.cat([torch.randperm(n, generator=rng(key, "order", i)) for i in epochs])
    assert_equal(vqldm.next_rows(n, step, size, key), order[step * size :][:size])


# ---- C. A folder of images: reading --------------------------------------------------------------
def mesh(height, width, cell):
    """Black and white squares of cell×cell pixels. From far away they are grey."""
    white = (np.indices((height, width)) // cell).sum(0) % 2 * 255
    return np.stack([white] * 3, 2).astype(np.uint8)


def test_the_middle_square_is_cut_out_and_shrunk_without_aliasing(read):
    """So a mesh of single pixels becomes grey. What lies beside the square is red, and gone."""
    wide = mesh(40, 80, 1)
    wide[:, :19] = wide[:, 61:] = 255, 0, 0
    high = Image.fromarray(wide.transpose(1, 0, 2).copy())
    for name, im in (("wide.png", Image.fromarray(wide)), ("high.png", high)):
        assert (read(im, name) - 128).abs().max() < 20
        assert (read(im.quantize(), f"few colours {name}") - 128).abs().max() < 20
    small = read(two_halves(size=(8, 8)), "small.png")
    assert 9 < small[2, 8, 8] < 246  # an edge between two pixels, when enlarged, is smooth


def test_a_jpeg_is_read_at_its_right_size_and_turned_as_its_camera_says(read):
    """The decoder shrinks it to a half, a quarter or an eighth. A mesh of 4×4 pixels, four times
    too large, stays a mesh. In the other image the left half, which is red, is really right."""
    coarse, mirrored = mesh(64, 128, 4), Image.Exif()
    image = read(Image.fromarray(coarse), "a.jpg", quality=95)
    assert (image[0] - torch.from_numpy(coarse[::4, 32:96:4, 0])).abs().max() < 40
    mirrored[0x0112] = 2
    for mode, name in (("RGB", "b.jpg"), ("RGB", "b.png"), ("RGBA", "c.png")):
        image = read(two_halves(mode), name, exif=mirrored)
        assert image[0, 8, 3] < 9 < image[0, 8, 12]


@pytest.mark.filterwarnings("error")  # PIL warns of a palette with transparency
def test_transparent_pixels_are_white_whatever_colour_lies_below(read):
    """Below the transparent left half lies green or grey. The right half is blue, or grey (29)."""
    lime, grey, alpha = two_halves(left="lime"), two_halves("L", 150, 29), two_halves("L", 0, 255)
    rgba, indexed = Image.merge("RGBA", [*lime.split(), alpha]), lime.quantize()
    key = dict(transparency=indexed.getpixel((0, 0)))
    files = [(rgba, "png", {}), (rgba.convert("PA"), "tif", {}), (indexed, "png", key)]
    files += [(Image.merge("LA", [grey, alpha]), "png", {}), (grey, "png", dict(transparency=150))]
    files += [(lime, "png", dict(transparency=(0, 255, 0)))]
    soft = Image.merge("RGBA", [*lime.split(), two_halves("L", 51, 255)])
    assert read(soft, "soft.png")[:, 8, 3].tolist() == [204, 255, 204]  # a fifth of lime
    for i, (im, kind, how) in enumerate(files):
        image = read(im, f"{i}.{kind}", **how)
        assert image[:, 8, 3].tolist() == [255] * 3, (im.mode, kind, how)
        assert image[:, 8, 12].tolist() == ([29] * 3 if im.mode[0] == "L" else [0, 0, 255])


def test_images_of_all_formats_and_modes_are_read_in_the_order_of_their_names(tmp_path, load):
    names = "0.bmp 1.gif 2.jpeg 3.jpg 4.png 5.tif 6.tiff 7.webp 8.jpe 9.jfif a/train/8.png".split()
    folder = fill(tmp_path / "photos", [*names, "b/ä b.JPeG", "z.TIFF"], size=(200, 200))
    old = Image.__version__ < "13"  # cannot read what it writes in YCbCr
    modes = f"0.bmp 1 4.png LA 5.tif CMYK 6.tiff P 8.jpe L z.TIFF {'L' if old else 'YCbCr'}".split()
    for name, mode in zip(modes[::2], modes[1::2]):
        Image.open(folder / name).convert(mode).save(folder / name)
    images = load(folder)
    assert classes_of(images) == ["images"] * 10 + ["a", "b", "images"]
    assert len(images.pixels[:].unique(dim=0)) == 13
    assert images.pixels[10:12, 0, 8, 3].tolist() == [10, 11]  # red counts up, see fill


def test_what_is_no_image_is_not_opened_or_skipped(tmp_path, load, printed, monkeypatch):
    """Hidden files, pipes and other formats are not opened, but the latter are counted. Links to
    folders are not followed. There is a WARNING of an image that ends too early, one that must not
    be read, three that would be black or white, one so large that PIL calls it a bomb, and of
    PostScript, for which PIL would start Ghostscript. The images around them keep their classes."""
    folder = fill(tmp_path / "photos", "a/1.png cut.jpg z/2.png", size=(200, 200))
    rest = "a.txt .git/x.png b.heic c.HEIF d.avif e.jp2 f.mpo g.jxl .hidden.png a/.b/c/1.png png"
    for name in [*rest.split(), "c/text.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    (folder / "album.jpg").mkdir()
    (folder / "a/up").symlink_to("..")
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.new("F", (9, 9)).save(folder / "floats.tiff")
    for name, order in (("deep.png", "<"), ("deep.tif", ">")):
        Image.fromarray(np.zeros((9, 9), f"{order}u2")).save(folder / name)
    Image.new("L", (400, 400)).save(folder / "giant.png")
    Image.new("RGB", (9, 9)).save(folder / "x.eps")
    (folder / "x.eps").rename(folder / "x.png")
    (folder / "locked.png").touch()
    locked = lambda call: call.self.name == "locked.png" and open("/nowhere")  # noqa: E731
    recorded(monkeypatch, Path, "read_bytes", locked)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript := Mock(side_effect=OSError))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    images = load(folder)
    bad = "c/text.jpg cut.jpg deep.png deep.tif floats.tiff giant.png locked.png x.png".split()
    assert "to folders or to nothing: ['a/up', 'gone.png']\n" in (told := printed())
    assert re.findall(r"WARNING skipped '(\S+)' \(", told) == bad and not ghostscript.called
    counted = {ending: 1 for ending in ".txt .heic .heif .avif .jp2 .mpo .jxl".split()}
    assert f"not read: {counted | {'without ending': 1}}\n" in told
    assert classes_of(images) == images.classes == ["a", "z"]  # and there is no class c
    assert images.pixels[:, 0, 8, 3].tolist() == [0, 2]  # red counts up, see fill


def test_runs_and_samples_in_a_folder_are_left_out_and_named(tmp_path, printed):
    """With all below them. Some of their files have names that other folders may have, too."""
    theirs = "0.bmp a/curves.png a/recon_step_000012.png b/grid.png c/evaluate.png z/0.bmp".split()
    folder = fill(tmp_path / "photos", theirs)
    ours = {"a/runs/vq": "last.pt", "new samples": "grid.png metadata.csv"}
    ours["b/results"] = "metrics.json evaluate.png 0.bmp"
    for place, files in ours.items():
        fill(folder / place, "x/0.bmp")
        for name in files.split():
            (folder / place / name).touch()
    assert [*vqldm.find_images(folder)] == theirs
    left_out = re.findall("^left out, a run or samples: (.*)$", printed(), re.M)
    assert {*left_out} == {f"{folder}/{place}" for place in ours}


@pytest.fixture()
def decoded_anew(load, monkeypatch):
    """A function that reads a folder twice -> Images. Only the first time they may be decoded."""
    decoded = recorded(monkeypatch, vqldm, "decode_images")

    def call(folder, **how):
        decoded.clear(), load(folder, **how)
        images = load(folder, **how)
        assert len(decoded) == 1
        return images

    return call


def test_the_cache_notices_a_file_that_was_rewritten(tmp_path, decoded_anew):
    """Even if it is as long and as old as before, or lies elsewhere, behind a link."""
    folder = fill(tmp_path / "all", "a/1.bmp b/1.bmp")
    (folder / "b/1.bmp").symlink_to((folder / "b/1.bmp").rename(tmp_path / "1.bmp"))
    decoded_anew(folder)
    for name, red in (("a/1.bmp", 50), ("b/1.bmp", 60)):
        stat = (folder / name).stat()
        fill(folder, [name], (red, 0, 99))
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (folder / name).stat().st_size == stat.st_size
        assert red in decoded_anew(folder).pixels[:, 0, 8, 3]


def test_the_cache_notices_what_images_depend_on(tmp_path, decoded_anew, monkeypatch):
    folder = fill(tmp_path / "all", "a/1.bmp b/1.bmp")
    assert decoded_anew(folder).classes == ["a", "b"]
    other = decoded_anew(fill(tmp_path / "other", "a/1.bmp b/1.bmp", (5, 0, 99)))
    assert other.pixels[:, 0, 8, 3].tolist() == [5, 6]
    (folder / "metadata.csv").write_text("file_name,group\na/1.bmp,G\nb/1.bmp,G")
    assert len(decoded_anew(folder).group.unique()) == 1
    (folder / "metadata.csv").write_text("file_name,class\na/1.bmp,mole\nb/1.bmp,scar")
    assert decoded_anew(folder).classes == ["mole", "scar"]
    assert decoded_anew(folder, size=32).pixels.shape == (2, 3, 32, 32)
    monkeypatch.setattr(vqldm.Image, "__version__", "0")
    decoded_anew(folder)
    grey, images = dict.fromkeys(vqldm.LESIONS, ("808080 " * 4, 0, 0)), []
    for name, new in dict(n=1, SKIN="ffffff " * 5, LESIONS=grey, synthetic=lambda *a: 99).items():
        monkeypatch.setattr(vqldm, name, new, raising=False)
        images.append(decoded_anew("synthetic", n_images=4))
    assert len(torch.cat([x.pixels[:] for x in images]).unique(dim=0)) == 13
    assert all(torch.equal(x.group, images[0].group) for x in images)  # always held out alike
    for part in (None, vqldm.read_image, vqldm.decode_images, vqldm.Images):
        monkeypatch.setattr(inspect, "getsource", lambda one, part=part: str((one, one is part)))
        decoded_anew(folder)


def test_a_damaged_cache_is_refused(tmp_path, load):
    """It may be cut, or hold objects, which may run code."""
    load(folder := fill(tmp_path / "all", "1.bmp"))
    (path,) = (tmp_path / "cache").iterdir()
    torch.save({**state_of(path), "classes": [Path("x")]}, tmp_path / "harmful")
    for content in (path.read_bytes()[:-50], (tmp_path / "harmful").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(vqldm.UserError, match="cache.*is damaged, delete it"):
            load(folder)


def test_a_locked_folder_or_lack_of_memory_ends_the_run(tmp_path, load, monkeypatch, refused):
    """If images were skipped, a class might be missing. Next time they are there."""
    locked = PermissionError(13, "no", "out of memory.bmp")  # a name that says what is looked for
    lack = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for place, error in {"os.scandir": locked, "PIL.Image.open": lack}.items():
        folder = fill(tmp_path / place, "a/1.bmp b/1.bmp b/val/2.bmp")
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            told = refused("train-vq", "--size", 32, "--data", folder, "--out", tmp_path / "vq")
        assert "out of memory" in told and len(load(folder, size=32).labels) == 3


@pytest.mark.parametrize("data, lost", [("1", "ImageOps"), ("1", "Image"), ("synthetic", "F")])
def test_a_mistake_in_the_code_for_images_is_raised(tmp_path, load, monkeypatch, data, lost):
    """If each image were skipped, whoever changes read_image would not see which line fails."""
    fill(folder := tmp_path / "1", "1.bmp 2.bmp")
    monkeypatch.setattr(vqldm, lost, SimpleNamespace(__version__="1"))
    with pytest.raises(AttributeError):
        load(data if data == "synthetic" else folder)


# ---- C. A folder of images: classes and groups ---------------------------------------------------
PHOTOS = "a.bmp b.bmp nevus/c.bmp nevus/d.bmp twice.bmp scar/twice.bmp"
REFUSED_TABLES = {  # a table, and what the sentence names that refuses it
    "image,class|a.bmp,scar": "['image', 'class']",
    "file_name,class,Patient ID|a.bmp,scar,P": "['file_name', 'class', 'Patient ID']",
    "file_name,class,class|a.bmp,scar,scar": "['file_name', 'class', 'class']",
    "": "['']",
    "file_name|a.bmp|b.bmp|a.bmp": "a.bmp",  # has two rows
    "file_name|a.bmp|c.bmp|b.bmp": "['c.bmp']",
    "file_name,class|a.bmp,mole,dark": "['a.bmp', 'mole', 'dark']",
    "file_name,class|a.bmp": "['a.bmp']",
    'file_name,class|a.bmp,mole|b.bmp,"scar': "unexpected end of data",  # an open quote
    "file_name,class|a.bmp,\udce9": "UnicodeDecodeError",  # é as older systems write it
    "file_name,patient_id|a.bmp,P|b.bmp,NaN": "patient_id 'NaN'",
    "file_name,group,class,lesion_id|a.bmp,G,scar,": "may have only one of",
}


@pytest.fixture()
def with_table(tmp_path, load):
    """A function that reads a folder of PHOTOS with this table as its metadata.csv -> Images."""

    def call(text):
        folder = fill(tmp_path / "my photos", PHOTOS)
        text = text.replace("|", "\n").encode("utf8", "surrogateescape")
        (folder / "metadata.csv").write_bytes(text)
        return load(folder)

    return call


@pytest.mark.parametrize("table", REFUSED_TABLES)
def test_a_table_in_another_format_is_left_to_the_tool(tmp_path, with_table, table):
    with pytest.raises(vqldm.UserError) as e:
        with_table(table)
    told = str(e.value).removeprefix(f"{tmp_path}/my photos/metadata.csv: ")
    assert REFUSED_TABLES[table] in told
    assert f"ype python tools/table.py '{tmp_path}/my photos'" in told


@pytest.mark.parametrize("name", "x.csv Metadata.CSV x.tsv x.xlsx x.xls x.ods".split())
def test_a_table_that_was_meant_is_not_overlooked(tmp_path, printed, name):
    folder = fill(tmp_path / "photos", "0.bmp a/1.bmp")
    (folder / name).touch()
    with pytest.raises(vqldm.UserError, match=f"python tools/table.py {folder} '{name}'"):
        vqldm.find_images(folder)
    (folder / name).rename(folder / f"~${name}")  # Excel makes it while its table is open
    assert len(vqldm.find_images(folder)) == 2 and "not read: nothing\n" in printed()


@pytest.mark.parametrize("name", "a/x.csv x.json x.jsonl x.parquet x.feather x.txt no.txt".split())
@pytest.mark.parametrize("stated", [False, True])
def test_what_may_be_a_table_is_asked_if_ids_or_classes_lack(tmp_path, printed, name, stated):
    folder = fill(tmp_path / "photos", "0.bmp a/1.bmp")
    (folder / name).write_text("image\tid\n0\t5" if name == "x.txt" else "One, two.\n\nThree.")
    if stated:
        (folder / "metadata.csv").write_text("file_name,class,group\n0.bmp,mole,1\na/1.bmp,scar,2")
    vqldm.find_images(folder)
    asked = f"WARNING not used, though classes or patients may be in it: {name}\n"
    assert (asked in printed()) == (not stated and name != "no.txt")


def test_ids_of_one_form_are_known():
    """Capitals, blanks, dashes, zeros, Excel's .0 and what cannot be seen do not count."""
    forms = "P1 p-001 p_1|12-3 12_3 12\u20133|101 101,00 0101|\ufb01x FIX FI\u200bX".split("|")
    for alike in forms:
        assert len({vqldm.id_form(word) for word in f"{alike} \t{alike}\t".split(" ")}) == 1
    apart = "12-3 12 1-23 123 A1-2 A12 A-B AB 1.5 15 1.0.1 12,000 P10 P1 10 P \u03b11".split()
    assert len({*map(vqldm.id_form, apart)}) == len(apart)


@pytest.mark.parametrize("a, b, n", [("12/3", "12-3", 2), ("nv", "n.v.?", 2), ("P1", "P2", 0)])
def test_ids_and_classes_with_the_same_letters_and_digits_are_asked(with_table, printed, a, b, n):
    with_table(f"file_name,class,patient_id|a.bmp,{a},{a}|b.bmp,{b},{b}|twice.bmp,other,other")
    asked = f"WARNING 1 pairs may be one, such as [({min(a, b)!r}, {max(a, b)!r})]: if so, spell"
    assert (told := printed()).count("WARNING") == told.count(asked) == n


@pytest.mark.parametrize("n, each, asked", [(11, 19, 1), (11, 20, 0), (10, 1, 0)])
def test_many_small_folders_may_be_patients_which_is_asked(tmp_path, printed, n, each, asked):
    """Those are meant that hold fewer than 20 images, and more than ten of them."""
    fill(tmp_path, [f"x/{i}/{j}.bmp" for i in range(n) for j in range(each)])
    vqldm.find_images(tmp_path)
    assert printed().count("folders ['0', '1', '10'], if they are no classes") == asked


# ---- D. Device, chance, processes ----------------------------------------------------------------
@pytest.mark.parametrize("gpu, dtype", [("meta", torch.float32), (None, torch.bfloat16)])
def test_auto_takes_the_gpu_if_there_is_one_and_says_so(monkeypatch, printed, gpu, dtype):
    """torch's device `meta` stands in for a GPU, and bf16 is switched on for the CPU alone. torch
    also names GPUs that it was built for but that are absent, unless it is asked to check."""
    on_cpu, current = torch.autocast("cpu", torch.bfloat16), "torch.accelerator.current_accelerator"
    monkeypatch.setattr(vqldm, "mixed_precision", lambda x: on_cpu)
    monkeypatch.setattr(current, lambda check_available=False: gpu if check_available else "cuda:7")
    assert vqldm.pick_device("auto").type == (gpu or "cpu")
    assert printed() == f"device {gpu or 'cpu'}, with matrix products in {dtype}\n"


def test_a_mac_gets_what_its_gpu_needs():
    """Networks lie in memory channels last, but on a Mac channels first. What its GPU lacks is left
    to the CPU by a variable, which must be set before torch is imported."""
    for kind, layout in (("cuda", torch.channels_last), ("mps", torch.contiguous_format)):
        vqldm.place(net := Mock(), torch.device(kind))
        net.to.assert_called_once_with(torch.device(kind), memory_format=layout)
    before = inspect.getsource(vqldm).partition("\nimport torch\n")[0]
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1" and "_MPS_FALLBACK" in before


def test_random_numbers_follow_from_their_key_in_any_process():
    """Python's own hash differs from process to process. If this number changes, whoever resumes a
    run gets other images and other noise, and whoever repeats one by its seed gets another run."""
    assert rng(0, "a").initial_seed() == 3057973756231466050


def test_a_training_goes_on_if_nobody_reads_what_it_says(trained, tmp_path, monkeypatch):
    """As in `train-vq | head -3`, where the pipe is closed after three lines, or if the terminal is
    gone. stderr, on which bars are drawn, may be closed from the start."""
    monkeypatch.setattr(sys, "stdout", Mock(flush=Mock(side_effect=BrokenPipeError)))
    monkeypatch.setattr(sys, "stderr", None)
    assert train("vq", tmp_path / "vq", "--epochs", 0.5)["step"] == 3


def test_a_process_of_torchrun_knows_its_number_and_takes_its_gpu(monkeypatch):
    """It is process 5 of 8, and the second one on its machine: it takes GPU 1 and meets the others.
    Batch systems set such variables, too, but without torchrun's own one it is alone."""
    for name, value in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: asked.append("meet"))
    for known in ((False, 0, 1), (True, 5, 8)):
        there = runpy.run_path(vqldm.__file__)
        assert (there["TORCHRUN"], there["RANK"], there["WORLD"]) == known
        with suppress(SystemExit):
            there["main"](["no command"])
        assert asked == [1, "meet"] * known[0]
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")


def one_of_two(rank, words, meeting):
    """The life of a process as torchrun starts it. The second one cannot write a file."""
    vqldm.TORCHRUN, vqldm.RANK, vqldm.WORLD = True, rank, 2
    how = dict(init_method=f"file://{meeting}", rank=rank, world_size=2)
    vqldm.dist.init_process_group = functools.partial(vqldm.dist.init_process_group, **how)
    if rank == 1:
        vqldm.write_whole = vqldm.draw_rows = vqldm.draw_curves = None
    sys.exit(cli(*words))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_with_the_weights_of_one(trained, tmp_path, capfd, stage):
    """Only the first one prints, validates and saves. (Muon is off, as it enlarges rounding.)"""
    words = "--epochs 1 --balance".split()
    if stage == "vq":
        words = "--muon-lr 0 --gan-start 0 --lam-max 1e4 --d-lr .001 --data synthetic --n-images 90"
        words = f"{words} --epochs 1 --batch-size 20".split()
    one, told = train(stage, tmp_path / "one", *words), capfd.readouterr().out
    words = [*STAGES[stage], *words, "--out", tmp_path / "two"]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=one_of_two, args=(i, words, tmp_path / "x")) for i in (0, 1)]
    [process.start() for process in both]
    [process.join(100) for process in both]
    [process.kill() for process in both]  # one that hangs would keep pytest from ending
    assert [process.exitcode for process in both] == [0, 0]
    texts = told, capfd.readouterr().out
    a, b = [re.sub(r"val:.*|/(one|two)", "", text).splitlines() for text in texts]
    assert a == b and len(a) > 6
    state = state_of(tmp_path / "two/last.pt")
    for part in {"model", "disc", "ema", "young"} & one.keys():
        for name, a in one[part].items():
            b = state[part][name] * (2 if name == "codebook.wins" else 1)  # these are means
            assert (a - b).norm() <= 1e-3 * a.norm() + 1e-5, (part, name)


@pytest.mark.parametrize("mine, other", [(0, 0), (0, 15), (2, 0), (2, 15)])
def test_a_signal_to_one_process_stops_all(tmp_path, monkeypatch, mine, other):
    beside(monkeypatch, float(other))
    run = vqldm.Run(vqldm.VQConfig(out=str(tmp_path)), 8, {}, None)
    run.signal = mine
    assert next(iter(run), "stopped") == ("stopped" if mine or other else 0)


def test_torchrun_is_for_training_in_batches_that_can_be_shared(empty_folder, monkeypatch, refused):
    monkeypatch.setattr(vqldm, "WORLD", 3)
    for command in ("sample", "evaluate"):
        assert "torchrun is for training" in refused(command)
    words = "train-vq --size 32 --n-images 60 --lpips-weight 0 --out new --batch-size 8"
    assert "--batch-size" in refused(*words.split()) and not Path("new").exists()


# ---- E. Keeping a run: stop and resume -----------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_a_training_prints_its_images_what_it_logs_and_what_comes_next(trained, stage):
    """Its log.json is the log of its checkpoint, in which every tenth step has a row."""
    rows = json.loads(Path("trained", stage, "log.json").read_text())
    assert rows == state_of(f"trained/{stage}/last.pt")["log"]
    assert [row["step"] for row in rows] == [2, 3, 4, 5, 6, 8, 9, 10, 10, 11, 12]
    kind, following = "samples", "sample --ckpt"
    if stage == "vq":
        kind, following = "recon", "train-ldm --preset default --vq"
    drawn = [str(call.path) for call in trained.drawn]
    assert f"trained/{stage}/{kind}_step_000012.png" in drawn
    assert trained.drawn[-1].rows["samples"].shape == (16, 3, 32, 32)
    told = trained.printed[stage].splitlines()
    measured = [line for line in told if "val:" in line]
    for line, row in zip(measured, trained.validations[stage], strict=True):
        values = [f"{name[4:]} {value:.4g}" for name, value in row.items() if name != "step"]
        assert line == f"{row['step'] / 12:4.0%} val: {' '.join(values)}"
    assert told[0] == "device cpu, with matrix products in torch.float32"
    place = f"trained/{stage}"
    shown = f"look at {place}/{kind}_step_000012.png and {place}/curves.png"
    assert told[-2:] == [shown, f"next: python vqldm.py {following} {place}"]


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
STOPS = [("vq", 0, INT), ("vq", 5, TERM), ("vq", 11, HUP), ("ldm", 1, INT), ("ldm", 2, TERM)]


def handlers():
    return [signal.getsignal(one) for one in (INT, TERM, HUP)]


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_signal_ends_a_training_after_its_step(tmp_path, printed, number):
    """The exit status tells which one it was. Only Ctrl-C once more would end the program at once.
    Afterwards all three do what they did before. A last part of a batch is a step of its own."""
    usual, run = handlers(), vqldm.Run(vqldm.VQConfig(out=str(tmp_path)), 801, {}, None)
    for _ in run:
        signal.raise_signal(number)
        assert (signal.getsignal(number) == signal.default_int_handler) == (number == INT)
        run.end_step({})
    assert handlers() == usual and run.step == 1
    with pytest.raises(SystemExit, match=f"^{128 + number}$"):
        run.finish("recon", "train-ldm")
    told = "saved at step 1 -- to go on, type the same command with --resume"
    assert printed().splitlines() == ["steps to go: 301 of 301", told]


def test_a_step_that_is_not_ended_once_is_told(tmp_path):
    """Without end_step, as after `continue`, the same step would come for ever."""
    for times in (0, 2):
        run = vqldm.Run(vqldm.VQConfig(out=str(tmp_path / str(times))), 800, {}, None)
        with pytest.raises(AssertionError, match="end_step"):
            [[run.end_step({}) for _ in range(times)] for _ in zip(run, range(3))]


def test_nohup_lets_a_training_outlive_its_terminal(tmp_path):
    """It starts the program with SIGHUP ignored, and ignored it stays."""
    signal.signal(HUP, signal.SIG_IGN)
    run = vqldm.Run(vqldm.VQConfig(out=str(tmp_path)), 800, {}, None)
    for _ in run:
        signal.raise_signal(HUP)
        assert handlers()[2] == signal.SIG_IGN and run.signal == 0
        break


@pytest.mark.parametrize("stage, stop, number", STOPS)
def test_a_resumed_run_ends_the_same(trained, tmp_path, monkeypatch, stage, stop, number):
    """Bit for bit, after a signal in step `stop`. Before it is resumed, its folder may be moved,
    and stage 1 may be overwritten."""
    out, vq = tmp_path / "a run", shutil.copytree("trained/vq", tmp_path / "v1.5")
    words = [*STAGES[stage], "--out", out, *["--vq", vq][: 2 * (stage == "ldm")]]
    with monkeypatch.context() as patch:
        ask = "lr_factor", lambda call: call.step == stop and signal.raise_signal(number)
        recorded(patch, vqldm, *ask)
        assert cli(*words) == 128 + number
    state = state_of(out / "last.pt")
    assert (state["step"], state["steps"]) == (stop + 1, 12)
    (vq / "last.pt").write_text("another run's")
    moved = out.rename(tmp_path / "moved")
    assert cli(STAGES[stage][0], "--resume", "--out", moved) == 0
    one, two = [state_of(Path(folder, "last.pt")) for folder in (f"trained/{stage}", moved)]
    for state in (one, two):  # equal in all but these
        state["config"].update(out="", vq="", resume=0, epochs=0)
    assert [part for part in one.keys() | two.keys() if not identical(one[part], two[part])] == []
    assert Path(f"trained/{stage}/log.json").read_bytes() == (moved / "log.json").read_bytes()


@pytest.mark.parametrize("epochs, steps", [(4, 0), (4.5, 2)])
def test_a_finished_run_stays_as_it_is_or_grows(copy_of, tmp_path, printed, epochs, steps):
    """It has made all twelve steps of its four epochs. The photographs may have been moved."""
    out, photos = copy_of("ldm"), shutil.copytree("photos", tmp_path / "moved")
    words = ["--out", out, "--epochs", epochs, "--data", photos, "--autoguidance", 3]
    assert cli("train-ldm", "--resume", *words) == 0
    assert f"steps to go: {steps} of {12 + steps}\n" in printed()
    old, new = state_of("trained/ldm/last.pt"), state_of(out / "last.pt")
    assert new["step"] == 12 + steps and identical(new["ema"], old["ema"]) == (steps == 0)
    changed = {name for name in old["config"] if old["config"][name] != new["config"][name]}
    assert changed - {"epochs"} == {"resume", "autoguidance", "out", "data"}
    assert new["config"]["data"] == str(photos)


def test_the_next_command_can_be_typed_as_it_is_printed(copy_of, tmp_path, printed):
    """The folder has a blank in its name, so it must be quoted. Stage 2 gets the same preset."""
    out = copy_of("vq", dict(preset="report")).rename(tmp_path / "a run")
    assert cli("train-vq", "--resume", "--out", out) == 0
    *begin, command = printed().splitlines()[-1].partition("vqldm.py ")
    words = ["train-ldm", "--preset", "report", "--vq", str(out)]
    assert shlex.split(command) == words and begin == ["next: python ", "vqldm.py "]
    assert vqldm.parser_of("train-ldm", vqldm.LDMConfig).parse_args(words[1:]).vq == str(out)


MAY_CHANGE = "--device another --data another --epochs 7.5"
SAMPLED_OTHERWISE = "--eta .5 --steps 4 --autoguidance 2.5 --class-guidance 3.5"
OTHERWISE = {bool: "", tuple: "=3,5,7", str: "=other", int: "=99", float: "=.123"}


@pytest.mark.parametrize("command", ["train-vq", "train-ldm"])
def test_a_resume_can_change_only_a_few_settings(copy_of, refused, command):
    """It can move, train longer and sample otherwise. All else is refused with its old value."""
    cls, _ = vqldm.COMMANDS[command]
    config = state_of((out := copy_of(cls.stage)) / "last.pt")["config"]
    words = f"--resume --out {out} {MAY_CHANGE} {SAMPLED_OTHERWISE * (cls.stage == 'ldm')}".split()
    cfg, _ = vqldm.resolve("", cls, words)
    fixed = sorted(name for name in config if getattr(cfg, name) == config[name])
    types = {field.name: field.type for field in fields(cls)}
    for name in fixed:
        usual = getattr(types[name], "__args__", [None])[-1]  # of a Literal
        words.append(f"--{name.replace('_', '-')}{OTHERWISE.get(types[name], f'={usual}')}")
    was = ", ".join(f"{name} was {config[name]}" for name in fixed)
    told = f"vqldm: --resume goes on with the recorded settings: {was}\n"
    assert refused(command, "--resume", *words) == told
    assert len(fixed) == len(config) - 5 - 4 * (command == "train-ldm")


def test_a_resume_without_what_the_run_began_with_is_refused(copy_of, monkeypatch, refused):
    """It needs as many steps, the same classes, and LPIPS if it began with it, or else not."""
    no_lpips, with_lpips = vqldm.load_lpips, lambda device: Mock()
    for stage, epochs, told, config, parts, load_lpips in (
        ("vq", 2, "fewer --epochs", {}, {}, no_lpips),
        ("ldm", 4, "classes have changed", {}, dict(classes=["mole", "wart"]), no_lpips),
        ("ldm", 4, "an older program", {}, dict(muon=None), no_lpips),
        ("vq", 4, "LPIPS must be loaded if", dict(lpips_weight=1), dict(lpips=True), no_lpips),
        ("vq", 4, "LPIPS must be loaded if", dict(lpips_weight=1), {}, with_lpips),
    ):
        monkeypatch.setattr(vqldm, "load_lpips", load_lpips)
        folder = copy_of(stage, config, **parts)
        before = (folder / "last.pt").read_bytes()
        assert told in refused(f"train-{stage}", "--resume", "--epochs", epochs, "--out", folder)
        assert (folder / "last.pt").read_bytes() == before
        shutil.rmtree(folder)


# ---- E. Keeping a run: checkpoints ---------------------------------------------------------------
BROKEN = {  # what last.pt may hold, made from the dict that belongs there
    "empty": lambda s: b"",
    "cut": lambda s: Path("trained/ldm/last.pt").read_bytes()[:-5000],
    "a list": lambda s: [1, 2],
    "objects, which may run code": lambda s: dict(s, more=Path("x")),
    "an unknown setting": lambda s: dict(s, config=dict(s["config"], unknown=1)),
    "another version": lambda s: dict(s, version=7),
}
for name in ("version", "stage", "config"):
    BROKEN["no " + name] = lambda s, name=name: {part: s[part] for part in s.keys() - {name}}


@pytest.mark.parametrize("how", BROKEN)
def test_a_checkpoint_not_ours_or_not_whole_is_refused(trained, tmp_path, how):
    content, path = BROKEN[how](state_of("trained/ldm/last.pt")), tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    why = "it is of version 7, train again" if how == "another version" else ""
    with pytest.raises(vqldm.UserError, match=rf"^--x .*last.pt: cannot be used \({why}"):
        vqldm.load_checkpoint(tmp_path, "--x", "ldm")


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Otherwise a computer that loses power could keep the name of a file without its content."""
    order = []
    for name in ("fsync", "replace"):
        recorded(monkeypatch, os, name, lambda call, name=name: order.append(name))
    vqldm.write_whole(tmp_path / "x", [1])
    assert order == ["fsync", "replace"] and state_of(tmp_path / "x") == [1]


def test_two_processes_can_write_one_file_at_the_same_time(tmp_path, monkeypatch):
    """The second begins and ends while the first one writes. What ends last stays."""
    x, second = tmp_path / "x", [["the second's"]]
    monkeypatch.setattr(os, "getpid", Mock(side_effect=[1, 2]))
    recorded(monkeypatch, torch, "save", lambda call: second and vqldm.write_whole(x, second.pop()))
    vqldm.write_whole(x, ["the first's"])
    assert state_of(x) == ["the first's"] and [*tmp_path.iterdir()] == [x]


def test_a_full_disk_or_memory_harms_no_checkpoint(copy_of, tmp_path, monkeypatch, refused):
    """torch reports a full disk, and a GPU without memory, in its own way. The last case asks for
    more memory than a CPU can have. No half of a file is left, and the folder can be used again."""
    out, new = copy_of("vq"), [*STAGES["vq"], "--out", tmp_path / "new"]
    before = (out / "last.pt").read_bytes()
    for place, told, error in (
        ("torch.save", ".pt: cannot be written", RuntimeError("[enforce fail] No space")),
        ("torch.save", "out of memory", OSError(12, "Cannot allocate memory")),
        ("torch.load", "out of memory", MemoryError),
        ("torch.load", "out of memory", RuntimeError("std::bad_alloc")),
        ("vqldm.augment", "out of memory", torch.OutOfMemoryError("CUDA out of memory.")),
        ("vqldm.augment", "out of memory", lambda *a: torch.empty(2**62, dtype=torch.uint8)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            assert told in refused("train-vq", "--resume", "--epochs", 4, "--out", out)
            assert (out / "last.pt").read_bytes() == before
            assert place != "torch.save" or told in refused(*new)
        assert not [*tmp_path.glob("*/.*")]
    assert not (tmp_path / "new/last.pt").exists()


def test_an_unknown_error_is_raised_and_signals_do_as_before(trained, tmp_path, monkeypatch):
    """Even one that speaks of memory."""
    usual = handlers()
    monkeypatch.setattr(vqldm, "augment", Mock(side_effect=RuntimeError("memory leak")))
    with pytest.raises(RuntimeError, match="leak"):
        cli(*STAGES["vq"], "--out", tmp_path / "new")
    assert handlers() == usual


def test_ctrl_c_outside_of_training_ends_at_once(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "open", Mock(side_effect=KeyboardInterrupt))
    assert cli(*STAGES["vq"], "--out", tmp_path / "x") == 130 and not (tmp_path / "x").exists()
    assert capsys.readouterr().err == "vqldm: stopped\n"


def test_what_is_built_on_an_unfinished_stage_gets_a_warning(copy_of, printed):
    """A stage 2 on an unfinished stage 1 would be hours lost. A resume needs no warning."""
    vq = copy_of("vq", step=3)
    for where, flag in zip([vq, vq, vq, "trained/vq"], "--vq --ckpt --resume --vq".split()):
        vqldm.load_checkpoint(where, flag, "vq")
    rest, whole = f"{vq}/last.pt at step 3 of 12\n", "from trained/vq/last.pt at step 12 of 12\n"
    assert printed() == 2 * f"WARNING unfinished: {rest}" + f"from {rest}" + whole


def test_a_checkpoint_of_a_gpu_can_be_read_without_one(trained, tmp_path, monkeypatch):
    state = state_of("trained/vq/last.pt")
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(state, tmp_path / "last.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vqldm.load_checkpoint("~", "--x", "vq")["step"] == 12


def test_of_two_runs_in_one_folder_the_second_fails(trained, tmp_path, monkeypatch, refused):
    """Even if it looked there before the first one had saved anything. But the second process of
    torchrun does not take the run that the first has begun for another one."""
    vq, table = tmp_path / "vq", fill(tmp_path / "samples") / "metadata.csv"
    recorded(monkeypatch, vqldm, "read_images", lambda call: shutil.copytree("trained/vq", vq))
    assert "another run" in refused(*STAGES["vq"], "--out", vq)
    assert (vq / "last.pt").read_bytes() == Path("trained/vq/last.pt").read_bytes()
    recorded(monkeypatch, vqldm, "restore_ldm", lambda call: table.write_text("the other's"))
    assert "another run" in refused("sample", "--ckpt", "trained/ldm", "--out", table.parent)
    assert table.read_text() == "the other's" and [*table.parent.iterdir()] == [table]
    monkeypatch.setattr(vqldm, "RANK", 1)
    vqldm.resolve("", vqldm.VQConfig, ["--out", str(vq)])  # raises nothing


def test_a_validation_comes_at_each_tenth_and_after_ten_minutes(tmp_path, monkeypatch):
    """There are 45 steps, and in the twelfth the ten minutes are over. Each validation is saved
    before its curves are drawn."""
    saved, clock, last = [], Mock(return_value=600), tmp_path / "last.pt"
    monkeypatch.setattr("time.perf_counter", clock)
    run = vqldm.Run(vqldm.VQConfig(out=str(tmp_path), batch_size=1, epochs=45), 1, {}, None)
    drawn = recorded(monkeypatch, vqldm, "draw_curves", lambda call: saved.append(state_of(last)))
    for step in run:
        clock.return_value = {10: 1200}.get(step, 600 if step < 10 else 1201)
        if run.end_step({"a": torch.tensor(float(step))}):
            run.end_validation({"b": run.step})
    steps = [5, 9, 12, 14, 18, 23, 27, 32, 36, 41, 45]
    assert [state["log"][-1] for state in saved] == [{"step": i, "val_b": i} for i in steps]
    assert all(call.path == tmp_path / "curves.png" and call.rows is run.log for call in drawn)
    tens = [{"step": step, "a": step - 1.0} for step in (10, 20, 30, 40)]
    assert [row for row in run.log if "a" in row] == tens


# ---- F. Pictures ---------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [8, 64])
def test_rows_of_pictures_are_drawn_under_their_names(tmp_path, side):
    """At most 16 in a row, on white. A row without images is left out. README's pictures have
    labels of 14 pixels and lines of two, so new ones must."""
    images = torch.randint(256, (20, 3, side, side), generator=rng("rows")).byte()
    path, rows = tmp_path / "new/grid.png", {"p": images[:3], "none": images[:0], "many": images}
    ORIGINAL.draw_rows(path, rows)
    sheet, height = np.moveaxis(np.array(Image.open(path)), 2, 0), side + 18
    assert sheet.shape == (3, 2 * height, 2 + 16 * (side + 2))
    for top, few in ((0, images[:3]), (height, images[:16])):
        assert sheet[:, top : top + 13].min() < 128  # something is written there
        assert (sheet[:, top + 14 : top + 16] == 255).all()
        for i, image in enumerate(few):
            left, below = 2 + (side + 2) * i, top + 16
            assert np.array_equal(sheet[:, below : below + side, left : left + side], image)
    assert (sheet[:, 14:height, 2 + 3 * (side + 2) :] == 255).all()


def test_curves_show_each_number_beside_that_of_held_out_images(tmp_path, monkeypatch):
    """A panel is logarithmic where all its values are positive and far apart."""
    log = [dict(step=0, mse=9.0, val_mse=8.0, d_real=1.0), dict(step=7, mse=1.0, d_real=0.1)]
    log += [dict(step=8, mse=2.0, d_fake=-9.0, lam=0.0, lam_wanted=5.0)]
    saved = recorded(monkeypatch, vqldm.Figure, "savefig")
    ORIGINAL.draw_curves(tmp_path / "curves.png", log)
    panels = ["val_mse", "mse"], ["lam_wanted", "lam"], ["d_real", "d_fake"]
    for names, ax in zip(panels, saved[0].self.axes, strict=True):
        shown = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
        for name in names:
            assert shown.pop(name) == [[row["step"], row[name]] for row in log if name in row]
        assert not shown and [text.get_text() for text in ax.get_legend().get_texts()] == names
        assert ax.get_yscale() == ("log" if "mse" in names else "linear")


# ---- G. Muon -------------------------------------------------------------------------------------
def test_muon_keeps_the_directions_of_the_mean_gradient_and_evens_out_their_strengths():
    """m becomes .95 m + .05 g. Write .95 m + .05 g = U S Vᵀ. Then a step is lr · U S' Vᵀ, where S'
    is S, scaled to length 1 and sent through Jordan's polynomial five times. So all strengths end
    near 1, though the largest in S is thirty times the smallest. It moves all of its kernels."""
    shapes = [(1, 1, 1, 1), (1, 9, 1, 1), (9, 1, 1, 1), (5, 3, 2, 2), (64, 4, 2, 2)]
    params = [nn.Parameter(randn(*shape)) for shape in shapes]
    muon, means = vqldm.Muon(params, 0.1), [0] * 5
    for key in range(3):
        before = [p.detach().flatten(1).clone() for p in params]
        for p in params:
            u, s, v = torch.linalg.svd(randn(*p.shape, key=key).flatten(1), full_matrices=False)
            p.grad = (u * torch.logspace(0, -1.5, len(s)) @ v).view(p.shape)
        muon.step()
        means = [0.95 * mean + 0.05 * p.grad for mean, p in zip(means, params)]
        for p, old, mean in zip(params, before, means):
            g = (0.95 * mean + 0.05 * p.grad).flatten(1)
            u, s, v = torch.linalg.svd(g, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            inner = u.T @ (old - p.detach().flatten(1)) @ v.T / 0.1
            assert_close(inner, s.diag(), rtol=0, atol=3e-3)
            assert 0.6 < s.min() and s.max() < 1.3


def test_muon_moves_kernels_whatever_their_names_but_no_first_and_last_layer():
    net = vqldm.VQGAN(vqldm.VQConfig(size=32, widths=(4, 8), codes=9))
    net.encoder.mid.first_of_last = own = nn.Conv2d(4, 4, 3)
    _, muon = vqldm.optimizers([net.encoder, net.decoder], net.cfg)
    moved = {*muon.param_groups[0]["params"]}
    coders = net.encoder, net.decoder
    ends = {layer.weight for part in coders for layer in (part.first, part.last)}
    assert own.weight in moved and not moved & ends


# ---- H. Commands ---------------------------------------------------------------------------------
FOLDERS = {"one": "a.bmp", "b-in-val": "a/0.bmp val/b/3.bmp", "none": ""}
MISTAKES = [  # a command, and what the sentence says that refuses it
    ("train", "train: is no command, see --help and tools/evaluate.py"),
    ("train-vq --data photos --out photos", "--out photos: holds the images; name another"),
    ("train-vq --data photos --out /proc/nope", "'/proc/cache'"),
    ("train-vq --size 40", "--size: must be a multiple of 16 above 16"),
    ("train-vq --size 16", "--size: must be a multiple of 16 above 16"),
    ("train-vq --device cuda:77", "--device cuda:77: cannot be used here, --device cpu can"),
    ("train-vq --data nowhere", "--data {}/nowhere: is no folder"),
    ("train-vq --data none", "--data {}/none: no usable image is there, not read: nothing"),
    ("train-vq --data trained/vq", "--data {}/trained/vq: is a run, not a folder of images"),
    ("train-vq --data one --held-out 0", "--held-out, --data, --n-images: too few groups to split"),
    ("train-vq --out trained/vq", "--out trained/vq: holds a run; --resume it, or name another"),
    ("train-vq --out one/a.bmp --data photos", "one/a.bmp"),
    ("train-vq --resume", "--resume runs/vq/last.pt: no checkpoint is there. Run train-vq first"),
    ("train-ldm", "--vq runs/vq: no checkpoint is there. Run train-vq first"),
    ("train-ldm --vq trained/ldm", "--vq trained/ldm: is not of train-vq"),
    ("train-ldm --vq trained/vq --T 1 --steps 1 --schedule linear", "--T: too few levels to end"),
    ("train-ldm --vq trained/vq --T 49", "--steps: must be at most T = 49"),
    ("train-ldm --vq trained/vq --out photos --data photos", "--out photos: holds the images"),
    ("train-ldm --vq trained/vq --data b-in-val", "--data: no image to train on of ['b']"),
    ("sample --ckpt ~no-such-user/x", "--ckpt ~no-such-user/x: no checkpoint is there"),
    ("sample --ckpt trained/ldm --class Mole", "--class Mole: choose one of ['mole', 'scar']"),
    ("sample --ckpt trained/ldm --out one", "--out one: is not empty; name a new folder"),
    ("sample --ckpt trained/ldm --steps 6", "--steps: must be at most T = 5"),
]


@pytest.fixture()
def mistaken(trained, empty_folder, monkeypatch, refused):
    """A function that runs a command, which must be refused in a sentence that says this. Nothing
    is written but a cache of images, and no run is lost. No image is drawn."""
    monkeypatch.setattr(vqldm, "synthetic", lambda *a: 1 / 0)
    for name, names in FOLDERS.items():
        fill(Path(name), names)
    for name in ("trained", "photos"):
        Path(name).symlink_to(trained.folder / name)

    def files():
        paths = itertools.chain(trained.folder.rglob("*.*"), empty_folder.rglob("*.*"))
        return {path: path.read_bytes() for path in paths if "cache" not in path.parts}

    def call(command, told):
        before = files()
        assert told.format(empty_folder) in refused(*command.split())
        assert files() == before

    return call


@pytest.mark.parametrize("command, told", MISTAKES)
def test_a_mistake_ends_in_one_sentence(mistaken, command, told):
    mistaken(command, told)


WRONG = {  # settings of train-vq, and what the sentence says that refuses them
    "--codes 0": "--codes 0: must be a whole number from 1",
    "--codes 1.5": "--codes 1.5: must be a whole number from",
    f"--codes {10**99}": f"--codes {10**99}: must be a whole number from 1 to",
    "--lr nan": "--lr nan: must be a number from 0",
    "--held-out .7": "--held-out .7: must be a number from 0 to 0.5",
    "--widths 16,0": "--widths 16,0: must be whole numbers such as 16,64",
    "--data=": "--data : must be a folder",
    "--seed 3 --epoch 3": "unrecognized arguments: --epoch 3; see --help",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_setting_is_told_what_it_must_be(words):
    with pytest.raises(vqldm.UserError, match=re.escape(WRONG[words])):
        vqldm.resolve("", vqldm.VQConfig, words.split())


class WithoutHelp(vqldm.Settings):
    rate: float = 0.1


def test_a_new_setting_without_help_is_told():
    with pytest.raises(vqldm.UserError, match="^rate: write it in one line with its help"):
        vqldm.parser_of("", dataclass(frozen=True)(WithoutHelp))


def test_a_folder_is_recorded_with_its_full_path(empty_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(empty_folder))
    parse = vqldm.parser_of("train-vq", vqldm.VQConfig).parse_args
    for word, path in (("new", empty_folder / "new"), ("~/new", empty_folder / "new")):
        assert parse(["--data", word]).data == str(path)
    assert parse(["--data", "synthetic"]).data == "synthetic"
    parse = vqldm.parser_of("train-ldm", vqldm.LDMConfig).parse_args
    assert parse(["--vq", "runs/./vq/"]).vq == "runs/vq"  # as the run on it may have recorded it
    assert vqldm.VQConfig(out="~/x").folder == empty_folder / "x"
    assert vqldm.VQConfig(out="~no-such-user/x").folder == Path("~no-such-user/x")


@pytest.mark.parametrize("command", [*vqldm.COMMANDS, "evaluate"])
def test_help_shows_each_setting_with_its_comment_and_its_default(command, monkeypatch, printed):
    """The comment stands beside the setting in the code, in the class that defines it last. A
    setting without one is found here. The default can be typed as it stands."""
    cls, _ = vqldm.COMMANDS.get(command, (evaluate.EvaluateConfig, None))
    monkeypatch.setenv("COLUMNS", "300")
    assert cli(command, "--help") == 0
    shown = re.sub(r"\n {10,}", "  ", printed())
    usage = "tools/evaluate.py" if command == "evaluate" else f"vqldm.py {command}"
    assert shown.startswith(f"usage: {usage} [") and f"\n\n{cls.__doc__}\n\n" in shown
    lines = re.findall(r"^  --([\w-]+)(?: \S+)? +(\S.*) \[(.*)\]$", shown, re.M)
    for field, (flag, text, default) in zip(fields(cls), lines, strict=True):
        assert flag == field.name.strip("_").replace("_", "-")
        owner = next(one for one in cls.__mro__ if field.name in inspect.get_annotations(one))
        line = rf"^    {field.name}: .*# {re.escape(text)}$"
        assert re.search(line, inspect.getsource(owner), re.M), field.name
        as_trained = owner is vqldm.Sampling and issubclass(cls, vqldm.SampleConfig)
        assert default == ("as trained" if as_trained else re.sub(r"[() ]", "", str(field.default)))


def test_help_without_a_command_is_one_screen_on_any_console(monkeypatch):
    """An ASCII console lacks some letters of the commands' help. In a notebook, `%run` prints to an
    object without an encoding that could be changed, such as StringIO."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert cli("train-vq", "--help") == 0
    for words in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "stdout", out := io.StringIO())
        assert cli(*words) == 0
        out.seek(0)
        told = out.read()
        assert "README.md" in told and len(told.splitlines()) <= 24
        for command, (cls, _) in vqldm.COMMANDS.items():
            assert re.search(rf"python vqldm.py {command} +{re.escape(cls.__doc__)}\n", told)


@pytest.fixture()
def settings_of(monkeypatch):
    """A function that types a command, which then does nothing -> the settings it was given."""
    given = []
    for name, (cls, _) in [*vqldm.COMMANDS.items()]:
        monkeypatch.setitem(vqldm.COMMANDS, name, (cls, lambda cfg, *a: given.append(cfg)))
    monkeypatch.setattr(evaluate, "evaluate", lambda cfg, *a: given.append(cfg))

    def call(words):
        assert cli(*words.split()) == 0, words
        return given.pop()

    return call


SETTINGS = [  # what is typed, and some settings that the command then has
    ("train-vq --out new --codes 9 --preset tiny --seed 3", dict(codes=9, epochs=4, seed=3)),
    ("train-vq --resume --out vq", dict(codes=16, epochs=2.8, preset="tiny", device="cpu")),
    ("train-vq --resume --out vq --preset tiny --epochs 7", dict(codes=16, epochs=7.0)),
    ("train-ldm --resume --out ldm --steps 4", dict(steps=4, T=5, widths=(12,), autoguidance=2.0)),
    ("sample --ckpt ldm/last.pt --steps 5 --seed 4", dict(steps=5, seed=4, eta=0.0, n=64)),
    ("evaluate --ckpt ldm --autoguidance 3", dict(autoguidance=3.0, steps=3, n=500, data="")),
]


@pytest.mark.parametrize("words, want", SETTINGS)
def test_typed_beats_recorded_beats_preset(copy_of, empty_folder, settings_of, words, want):
    """Both runs were trained with settings of their own, and the first one with --preset tiny."""
    copy_of("ldm"), copy_of("vq", dict(preset="tiny", device="cpu"))
    settings = vars(settings_of(words))
    assert {name: settings[name] for name in want} == want


PRESETS = {  # what can be typed instead of --preset
    "train-vq --preset default": "--seed 0 --device auto --upsample nearest --lr .001 "
    "--data synthetic --n-images 4096 --held-out .1 --augment all --size 64 --widths 16,64 "
    "--z-dim 3 --codes 2048 --lpips-weight .1 --commit-weight .25 --gan-weight .2 --lam-max .004 "
    "--gan-start .1 --muon-lr .02 --codes-lr .02 --d-lr .0004 --batch-size 8 --epochs 3",
    "train-ldm --preset default": "--seed 0 --device auto --upsample nearest --lr .001 "
    "--vq runs/vq --T 1000 --schedule cosine --target v --widths 64,128 --ema .995 --batch-size 32 "
    "--muon-lr .01 --epochs 23 --eta 0 --steps 50 --autoguidance 2 --class-guidance 1.5",
    "train-vq --preset tiny": "--size 32 --n-images 200 --widths 16,32 --codes 64 --epochs 4",
    "train-ldm --preset tiny": "--T 200 --widths 32,64 --batch-size 16 --epochs 16",
    "train-vq --preset quick": "--n-images 800 --held-out .05 --epochs 2.4",
    "train-ldm --preset quick": "--epochs 16",
    "train-vq --preset report": "--upsample transposed --lpips-weight 1 --commit-weight 1 "
    "--gan-weight 1 --lam-max 10000 --gan-start .267 --epochs 30 --lr .0003 --muon-lr 0 "
    "--codes-lr .0003 --d-lr .0003",
    "train-ldm --preset report": "--upsample transposed --unconditional --target eps --eta 1 "
    "--schedule linear --steps 1000 --autoguidance 1 --class-guidance 1 --muon-lr 0",
}


@pytest.mark.parametrize("command", PRESETS)
def test_these_are_the_presets(empty_folder, settings_of, command):
    """The numbers in README and RESULTS belong to these. Whoever changes one measures anew."""
    preset = settings_of(f"{command} --out new")
    typed = settings_of(f"{command.split()[0]} --out new {PRESETS[command]}")
    assert preset == vqldm.replace(typed, preset=preset.preset)


# ---- README and the pages in docs ----------------------------------------------------------------
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf8") for path in PAGES}


def section(page, heading):
    """-> the text below a heading, up to the next one."""
    return re.search(rf"^##+ {heading}\n(.*?)(?=^##+ |\Z)", PAGES[page], re.M | re.S)[1]


def blocks(kind, text):
    """-> the blocks of code of this kind in a text."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def without_comments(line):
    return re.sub(" *#.*", "", line)


def test_commands_of_the_pages_can_be_typed(empty_folder, monkeypatch, settings_of):
    """They have no comments, which zsh, the shell of a Mac, would take for arguments."""
    known = {"vq": {"settings": vqldm.VQConfig()}, "ldm": {"settings": vqldm.LDMConfig()}}
    monkeypatch.setattr(vqldm, "load_checkpoint", lambda where, flag, stage: known[stage])
    for tool, work in ((table, "convert"), (letters, "draw_letters"), (classifier, "compare")):
        monkeypatch.setattr(tool, work, Mock())
    shell = "".join([*blocks("sh", "\n".join(PAGES.values())), letters.__doc__])
    commands = re.findall(r"python (vqldm|tools/\w+)\.py([^\n&]*)", shell)
    assert len(commands) == len(re.findall("vqldm.py|tools/", shell)) and "#" not in shell
    for program, words in commands:
        words = program.removeprefix("tools/").replace("vqldm", "") + words
        settings_of(words) if words[0] == " " or "evaluate" in words else cli(*words.split())


def test_each_flag_that_the_pages_name_exists(printed):
    for words in (["train-vq"], ["train-ldm"], ["sample"], ["evaluate"], ["table"]):
        assert cli(*words, "--help") == 0
    pages = "".join(text for name, text in PAGES.items() if name != "TEACHING.md")
    others = "--index-url --nproc-per-node --install --search --limit --cpu "
    others += "--kid --kid-subset-size --input1 --input2 --minutes --tuned --like"  # of others
    named = {*re.findall(r"(?<![\w-])--[a-z][\w-]+", pages)}
    assert named <= {*re.findall(r"--[\w-]+", printed()), *others.split()}


def test_readmes_excerpt_is_of_the_program():
    """Comments and empty lines may differ."""
    texts = *blocks("python", section("README.md", "How it works")), inspect.getsource(vqldm)
    excerpt, code = [re.sub("\n+", "\n", without_comments(text)) for text in texts]
    assert excerpt.strip("\n") in code and excerpt.count("\n") > 1


def test_the_example_in_python_runs_and_seeds_nothing(copy_of, empty_folder, monkeypatch):
    """Loading a model must not change the caller's random numbers by a seed."""
    copy_of("ldm", classes=["mole", "nevus-like"]).rename(fill(Path("runs")) / "ldm")
    torch.manual_seed(7)
    devices = recorded(monkeypatch, vqldm, "pick_device")
    (code,) = blocks("python", section("CHANGING.md", "From Python"))
    exec(code, there := {})
    assert [call.name for call in devices] == ["auto"] and torch.initial_seed() == 7
    assert there["images"].shape == there["recon"].shape == (4, 3, 32, 32)
    assert not there["model"].vqgan.decode(there["k"]).requires_grad  # it is frozen


@pytest.mark.parametrize("heading", re.findall("^### (.*)", PAGES["CHANGING.md"], re.M))
def test_each_change_of_changing_passes_its_check(empty_folder, monkeypatch, heading):
    """A part of its diff stands once in the program."""
    text = section("CHANGING.md", heading)
    (diff,), (check, *_) = blocks("diff", text), blocks("python", text)
    lines = Path(vqldm.__file__).read_text(encoding="utf8").split("\n")
    for _, *part in [hunk.split("\n") for hunk in diff.strip().split("@@ ")[1:]]:
        old = [line[1:] for line in part if line[:1] in ("-", " ")]
        (at,) = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
        lines[at : at + len(old)] = [line[1:] for line in part if line[:1] != "-"]
    Path("vqldm.py").write_text("\n".join(lines), encoding="utf8")
    spec = importlib.util.spec_from_file_location("vqldm", "vqldm.py")
    spec.loader.exec_module(changed := importlib.util.module_from_spec(spec))
    for name in ("load_lpips", "draw_curves"):
        monkeypatch.setattr(changed, name, lambda *a: None)
    monkeypatch.setitem(sys.modules, "vqldm", changed)
    exec(check, {})
