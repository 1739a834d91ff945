# SPDX-License-Identifier: MIT
"""Tests of vqldm.py, in the order of its sections. The name of a test is what the program promises.
The strongest are the references in sections 4, 7 and 8. They contain both trainings and the
sampler a second time, written as plainly as possible, and must arrive at the program's numbers.
Where a test replaces a part of the program, another test checks that part itself. A limit is tested
on both sides. No two numbers that could be mistaken for each other are equal, what is skipped has
something good behind it, and every loop over batches has two that differ. No network, no GPU and no
data set is needed.

Contents   Helpers and fixtures     7. From noise to images    D. Device, chance, processes
           1. Blocks                8. Stage 2: training       E. Keeping a run
           2. Stage 1: the VQGAN    9. Sampling                F. Pictures
           3. Stage 1: the losses   A. Reconstructions         G. Muon
           4. Stage 1: training     B. Drawn lesions           H. Commands
           5. Stage 2: diffusion    C. A folder of images      README and the pages in docs
           6. Stage 2: the UNet                                The programs in tools
Fixtures   plain_cpu: every test computes on a CPU, without pictures and without LPIPS
           trained, copy_of: both stages, trained on photographs once for all tests, and copies
           runs: both stages as the references compute them, in float32 and by the preset report
           empty_folder, load, read: a folder to work in, and how images in it are read
           printed, refused, settings_of: what a command prints, its error, its settings
           lpips: LPIPS without a download · ldm: a stage 2 whose classes have odd names
           evaluation: what evaluate says of photographs that no training has seen
"""

import copy, csv, functools, hashlib, inspect, io, itertools, json, math, multiprocessing, os, re
import importlib.util, runpy, shlex, shutil, signal, sys
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
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
import classifier, evaluate, letters, table

TOOLS = dict(classifier=classifier, evaluate=evaluate, letters=letters, table=table)

torch.set_num_threads(1)  # with tensors as small as these, more threads only cost time
ORIGINAL = SimpleNamespace(**vars(vqldm))  # the program before any test replaces a part of it
inspect.getsource = functools.cache(inspect.getsource)  # it reads the whole file for each class
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
        vqldm.VQConfig(data=str(data), size=size, **how), tmp_path / "cache"
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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with photos of the classes mole and scar (24 and 12 in train, 8 and 4 in val), and
    with both stages, trained on them in trained/vq and trained/ldm. The result has its path, what
    each stage printed, the validations in its log, and all calls of draw_rows."""
    folder = tmp_path_factory.mktemp("both stages")
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


def train(stage, out, *words):
    """Train a stage as in `trained`, but for these words, into the folder `out` -> checkpoint."""
    assert cli(*STAGES[stage], *words, "--out", out) == 0
    return state_of(Path(out, "last.pt"))


def copy_stage(trained, to, stage, config=None, **parts):
    """Copy a stage from `trained` to the folder `to` -> the copy. Parts of its checkpoint can be
    replaced, and settings in its config."""
    folder = shutil.copytree(trained.folder / "trained" / stage, to / stage)
    state = {**state_of(folder / "last.pt"), **parts}
    state["config"].update(config or {})
    torch.save(state, folder / "last.pt")
    return folder


@pytest.fixture()
def copy_of(trained, tmp_path):
    """copy_stage, to tmp_path/vq or tmp_path/ldm."""
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


def test_learning_rates_rise_for_50_steps_and_fall_to_a_hundredth():
    points = (0, 0.0), (49, 0.1), (99, 0.2), (99, 0.7), (999, 0.999)
    factors = [vqldm.lr_factor(step, progress) for step, progress in points]
    assert factors == pytest.approx([0.02, 1, 1, 0.5, 0.01])


# The references here and in 7 and 8 use the program's layers and Muon, which other tests check,
# and draw random numbers by the same keys. They share none of its loops.
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
    orders = [torch.randperm(len(train), generator=rng(cfg.seed, "order", i)) for i in range(11)]
    rows = train[torch.cat(orders)].split(cfg.batch_size)
    n = math.ceil(len(train) * cfg.epochs / cfg.batch_size)
    for i in range(n):
        progress = i / n
        yield i, rows[i], progress, max(0.01, min(1, (i + 1) / 50, (1 - progress) / 0.6))


def adam(params, betas=(0.9, 0.99)):
    return torch.optim.Adam(params, 0.0, betas, fused=True)


def step_along(net, loss, rates, factor):
    """One step of each optimiser in rates, which is {optimiser: learning rate}."""
    params = list(net.parameters())
    for p, g in zip(params, torch.autograd.grad(loss, params)):
        p.grad = torch.empty_like(p).copy_(g)  # fused Adam wants the memory layout of p
    nn.utils.clip_grad_norm_(params, 1.0)
    for optimizer, lr in rates.items():
        optimizer.param_groups[0]["lr"] = factor * lr
        optimizer.step()


def rates_of_vqgan(net, cfg):
    """Muon, if it has a rate, moves the kernels inside. Adam moves the rest, and the codes."""
    ends = {*net.encoder.first.parameters(), *net.encoder.last.parameters()}
    ends |= {*net.decoder.first.parameters(), *net.decoder.last.parameters()}
    kernels = [p for p in net.parameters() if cfg.muon_lr and p.dim() == 4 and p not in ends]
    code = net.codebook.embedding.weight
    rest = [p for p in net.parameters() if p is not code and p not in {*kernels}]
    return {adam(rest): cfg.lr, adam([code]): cfg.codes_lr, vqldm.Muon(kernels, 0.0): cfg.muon_lr}


def error_of_means(x_hat, x):
    """Takes the place of LPIPS: the squared error of 4×4 means. It must be called in float32."""
    assert not torch.is_autocast_enabled("cpu")
    return F.avg_pool2d(x_hat.float() - x, 4).square().mean((1, 2, 3))


def plain_vq(cfg):
    """Stage 1 written out -> VQGAN, D, how many codes restarted last, and the end of the log."""
    images, train, val = drawn_images(cfg)
    torch.manual_seed(cfg.seed)
    net, disc = vqldm.VQGAN(cfg), vqldm.PatchDiscriminator(cfg.widths)
    for part in (net, disc):
        part.to(memory_format=torch.channels_last)  # so that rounding is the same
    book, last, log = net.codebook, net.decoder.last.weight, {}
    rates = rates_of_vqgan(net, cfg)
    rates_d = {adam(disc.parameters(), (0.5, 0.9)): cfg.d_lr}
    for i, rows, progress, factor in steps_of(cfg, train):
        if i % 50 == 0:
            restarts = int((book.wins == 0).sum())
            book.restart_unused(net.encoder(images[rows]), rng(cfg.seed, "restart", i))
        turns = torch.randint(8, (len(rows),), generator=rng(cfg.seed, "turns", i))
        x = vqldm.augment(images[rows], turns)

        z = net.encoder(x)
        k = book.nearest(z)
        code = book.lookup(k)
        x_hat = net.decoder(z + (code - z).detach())
        mse, lpips = F.mse_loss(x_hat, x), error_of_means(x_hat, x).mean()
        codebook, commit = F.mse_loss(code, z.detach()), F.mse_loss(z, code.detach())
        rec = mse + cfg.lpips_weight * lpips
        loss = rec + codebook + cfg.commit_weight * commit
        gan_on = progress >= cfg.gan_start
        if gan_on:
            real, adversarial = disc(x), -disc(x_hat).mean()
            of = functools.partial(torch.autograd.grad, inputs=last, retain_graph=True)
            wanted = of(rec)[0].norm() / (of(adversarial)[0].norm() + 1e-4)
            lam = wanted.clamp(max=cfg.lam_max)
            loss = loss + cfg.gan_weight * lam * adversarial
        step_along(net, loss, rates, factor)
        book.wins += torch.bincount(k.flatten(), minlength=cfg.codes)

        if gan_on:
            fake = disc(x_hat.detach())
            d_loss = F.relu(1 - real).mean() / 2 + F.relu(1 + fake).mean() / 2
            step_along(disc, d_loss, rates_d, factor)
        if i % 10 == 9:
            log.update(mse=mse, lpips=lpips, codebook=codebook)
            if gan_on:
                log.update(d_loss=d_loss, d_real=real.mean(), d_fake=-adversarial)
                log.update(lam=lam, lam_wanted=wanted)
    x = images[val]
    with torch.no_grad():
        k = book.nearest(net.encoder(x))
        x_hat = net.decoder(book.lookup(k)).clamp(-1, 1)
    mse, p = (x_hat - x).square().mean((1, 2, 3)), torch.bincount(k.flatten()) / k.numel()
    log.update(val_mse=mse.mean(), val_psnr=(10 * (4 / mse).log10()).mean())
    log.update(val_lpips=error_of_means(x_hat, x).mean(), codes=(p > 0).sum() / cfg.codes)
    log.update(entropy=-torch.special.xlogy(p, p).sum())
    return net, disc, restarts, {name: float(value.detach()) for name, value in log.items()}


@pytest.fixture(scope="module", params=["float32", "report"])
def runs(request, tmp_path_factory):
    """Both stages, trained by the program: in float32 with Muon, v and balanced classes, or by the
    preset report in bf16. In float32 no number is the default, or equal to another one, and words
    differ between the stages. (If the discriminator joined early, rounding errors would grow until
    the reference chooses other codes.)"""
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    vq_cfg = vqldm.VQConfig(
        **dict(size=32, n_images=46, held_out=0.22, widths=(4, 8), z_dim=5, codes=500, seed=7),
        **dict(lpips_weight=0.5, commit_weight=0.3, gan_weight=0.4, lam_max=0.006, gan_start=0.75),
        **dict(lr=5e-4, muon_lr=0.005, codes_lr=0.003, d_lr=2e-3, batch_size=4, epochs=6.5),
        **dict(out=str(folder / "vq"), upsample="transposed"),
    )
    cfg = vqldm.LDMConfig(
        **dict(T=40, widths=(8, 12), ema=0.6, lr=1e-2, batch_size=2, epochs=2.4, seed=8, steps=9),
        **dict(eta=0.7, autoguidance=1.7, class_guidance=1.2, balance=True),
        **dict(vq=vq_cfg.out, out=str(folder / "ldm")),
    )
    settings = [(getattr(one, f.name), f.default) for one in (vq_cfg, cfg) for f in fields(one)]
    numbers = [(x, usual) for x, usual in settings if type(x) in (int, float, tuple)]
    assert len(numbers) == 29 == len({x for x, usual in numbers if x != usual})
    if kind == "report":
        preset = vqldm.PRESETS["report"]
        vq_cfg = vqldm.replace(vq_cfg, **{**preset["vq"], "epochs": 1.1})
        cfg = vqldm.replace(cfg, **{**preset["ldm"], "epochs": 1, "steps": 40, "balance": False})
    with pytest.MonkeyPatch.context() as patch:
        use_plain_cpu(patch, bf16=kind == "report")
        patch.setattr(vqldm, "load_lpips", lambda device: error_of_means)
        losses = recorded(patch, Diffusion, "loss")
        vqldm.train_vq(vq_cfg, torch.device("cpu"))
        vqldm.train_ldm(cfg, torch.device("cpu"))
    runs = SimpleNamespace(kind=kind, bf16=kind == "report", vq_cfg=vq_cfg, cfg=cfg)
    runs.vq, runs.ldm = [vqldm.load_checkpoint(c.out, "", c.stage) for c in (vq_cfg, cfg)]
    runs.model = vqldm.restore_ldm(runs.ldm, torch.device("cpu"))
    runs.held_losses = losses[-1].result  # the last validation's, one for each held-out image
    return runs


def assert_same_weights(state, net, part):
    for name, p in net.named_parameters():
        where = f"{part} {name}: {{}}".format
        assert_close(state[name], p.detach(), rtol=1e-3, atol=1e-4, msg=where)


def test_reference_stage_1_ends_with_the_programs_weights_and_log(runs):
    """If one rate, row, turn, loss or restart were wrong, weights would differ. So they would if
    rounding decided between two equally near codes, but then few choices differ."""
    net, disc, restarts, log = plain_vq(runs.vq_cfg)
    assert runs.vq["lpips"] and "codebook.wins" in runs.vq["model"]  # a resumed run needs them
    wins, want = runs.vq["model"]["codebook.wins"], net.codebook.wins
    other = float((wins - want).abs().sum() / 2 / want.sum())
    assert other < 0.01, f"{other:.1%} of the choices of codes differ, too many for rounding"
    hint = f" ({other:.1%} of choices differ. If rounding did it, another seed helps.)"
    assert_same_weights(runs.vq["model"], net, "VQGAN" + hint * (other > 0))
    assert_same_weights(runs.vq["disc"], disc, "discriminator" + hint * (other > 0))
    assert all(p.grad.any() for p in net.parameters())  # so every weight has really moved
    assert 0 < restarts < 500 if runs.kind == "float32" else restarts == 500
    rows = runs.vq["log"]
    logged = {**[row for row in rows if "mse" in row][-1], **rows[-1]}
    assert logged["val_codes_used_percent"] == pytest.approx(100 * log.pop("codes"), rel=0.02)
    assert logged["val_perplexity"] == pytest.approx(math.exp(log.pop("entropy")), rel=0.02)
    assert {name: logged[name] for name in log} == pytest.approx(log, rel=1e-3)


def test_without_a_weight_there_is_no_gan_and_no_lpips(trained, tmp_path, monkeypatch):
    gan = recorded(monkeypatch, vqldm, "adaptive_weight")
    monkeypatch.setattr(vqldm, "load_lpips", None)
    train("vq", tmp_path, *"--gan-start 0 --gan-weight 0 --epochs .01".split())
    assert not gan


@pytest.mark.parametrize("augment, want", [("mirror", {0, 4}), ("none", {0})])
def test_both_stages_turn_images_only_as_allowed(trained, tmp_path, monkeypatch, augment, want):
    shown = recorded(monkeypatch, vqldm, "augment")
    for words in (["vq", "vq", "--augment", augment], ["ldm", "ldm", "--vq", tmp_path / "vq"]):
        shown.clear()
        train(words[0], tmp_path / words[1], *words[2:], "--epochs", 0.5)
        assert {int(turn) for call in shown for turn in call.symmetries} == want


def test_each_validation_of_stage_1_draws_the_same_images_and_what_became_of_them(trained):
    """There are 18 of them, in several batches. The pictures have the error that is logged."""
    log = trained.validations["vq"]
    drawn = [call for call in trained.drawn if "recon" in call.path.name]
    names = [f"trained/vq/recon_step_{row['step']:06}.png" for row in log]
    assert [str(call.path) for call in drawn] == names and len(names) == 10
    assert len({*bytes_of([call.rows["original"] for call in drawn])}) == 1
    x, x_hat = [vqldm.to_float(drawn[-1].rows[name]) for name in ("original", "reconstruction")]
    assert len(x) == 18 and F.mse_loss(x_hat, x) == pytest.approx(log[-1]["val_mse"], 0.01)


def test_stage_1_measures_the_first_256_of_many_held_out_images(trained, tmp_path, monkeypatch):
    many = torch.arange(9), torch.arange(300) % 48, torch.zeros(0)
    monkeypatch.setattr(vqldm, "split", lambda *a: many)
    measured = recorded(monkeypatch, vqldm, "reconstruct")
    train("vq", tmp_path, "--epochs", 0.1)
    assert len(measured[0].pixels) == 256


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


@pytest.mark.parametrize("steps", [60, 7])  # each level, or eight to nine levels at once
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_with_eta_1_a_step_is_that_of_ddpms_algorithm_2(schedule, steps):
    """In float64, line 4 as the paper prints it, with β̃, the second variance of its section 3.2. In
    a step over several levels, α is the product of theirs. At the end σ is 0. Each step also gives
    the estimate of z0, by equation 9."""
    diffusion, beta = Diffusion(60, schedule, "eps"), betas(60, schedule)
    alpha_bar = np.append(np.cumprod(1 - beta), 1)
    diffusion.alpha_bar = torch.from_numpy(alpha_bar)
    z, noise, *eps = randn(62, 2, 3, 4, 4).double()
    walk = diffusion.sample(lambda z_t, t: eps[t[0]], z, steps, 1.0, lambda: noise)
    for (t, prev), (now, z0_hat) in zip(diffusion.pairs(steps), walk, strict=True):
        alpha = np.prod(1 - beta[prev + 1 : t + 1])
        mean = (z - (1 - alpha) / np.sqrt(1 - alpha_bar[t]) * eps[t]) / np.sqrt(alpha)
        variance = (1 - alpha_bar[prev]) / (1 - alpha_bar[t]) * (1 - alpha)
        assert_close(now, mean + np.sqrt(variance) * noise, rtol=1e-9, atol=1e-9 * float(z.std()))
        z0 = (z - np.sqrt(1 - alpha_bar[t]) * eps[t]) / np.sqrt(alpha_bar[t])
        assert_close(z0_hat, z0, rtol=1e-9, atol=1e-9 * float(z0.std()))
        z = now


@pytest.mark.parametrize("T", [1, 3, 50, 1000, 3000])
def test_sampling_gives_numbers_at_any_T_eta_and_number_of_steps(T):
    """Roots of what rounding makes negative would be none, nor is 0/0, which the first levels give
    if there are millions. Linear ends in noise only if T > 1. With eta 0 no noise is drawn."""
    z, schedules = torch.ones(1, 1, 1, 1), ["cosine", "linear"][: 1 + (T > 1)]
    for schedule, eta in itertools.product(schedules, (0.0, 0.5, 1.0)):
        diffusion, noise = Diffusion(T, schedule), (lambda: z) if eta > 0 else None
        for steps in (1, 2, 7, 10, 31, 99, 100):
            walk = diffusion.sample(lambda z_t, t: z_t, z, steps, eta, noise)
            assert [*walk][-1][0].isfinite(), (schedule, eta, steps)
    diffusion.alpha_bar = torch.ones(T + 1)
    assert [*diffusion.sample(lambda z_t, t: z_t, z, 2, 1.0, lambda: z)][-1][0].isfinite()


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


DDIM = dict(eta=0.0, steps=7, autoguidance=3.0, class_guidance=0.5)
DDPM = dict(eta=1.0, steps=7, autoguidance=1.0, class_guidance=2.5)


@pytest.mark.parametrize("how", [DDIM, DDPM, {}], ids=["ddim", "ddpm", "as trained"])
def test_reference_sampling_ends_with_the_programs_latents(runs, how, monkeypatch):
    """The noise of an image depends on its id alone, not on its batch: here the program makes
    batches of 32 and 4, and the reference one of 3. A guidance of 1 costs no call."""
    use_plain_cpu(monkeypatch)  # in bf16, rounding would depend on the size of the batch
    # a single class has no class guidance, with or without --unconditional
    monkeypatch.setattr(runs.model, "cfg", vqldm.replace(runs.cfg, unconditional=False))
    how = {**{name: runs.ldm["config"][name] for name in vqldm.SAMPLING}, **how}
    cfg = vqldm.SampleConfig(**how, seed=21)  # not that of the training
    strong = recorded(monkeypatch, runs.model.ema, "forward")
    young = recorded(monkeypatch, runs.model.young, "forward")
    ids = torch.arange(0, 7001 * 36, 7001)  # torch's integers must do as well as Python's
    label = torch.tensor([2, 0, 1]).repeat(12) % len(runs.ldm["classes"])
    pictures, latents = runs.model.generate(cfg, ids, label)
    assert len(young) == (2 * cfg.steps if cfg.autoguidance != 1 else 0)
    assert len(strong) == 2 * cfg.steps * (1 + (len(runs.ldm["classes"]) > 1))
    some = [33, 4, 9]
    z = plain_sample(runs, cfg, label[some], [rng(21, "sample", 7001 * i) for i in some])
    assert_close(latents[some], z, rtol=1e-4, atol=1e-4 * float(z.std()))
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
    seed, B = cfg.seed, cfg.batch_size
    turned = [vqldm.augment(images, [turn] * len(images)) for turn in range(8)]
    k = torch.stack([vqgan.codebook.nearest(vqgan.encoder(x)) for x in turned], 1)
    codes = vqgan.codebook.embedding.weight[k]  # (n,8,h,w,d)
    std, mean = torch.std_mean(codes[train].double().flatten(0, -2), 0, correction=0)
    assert_close(runs.ldm["scale"].double(), torch.stack([mean, std]), rtol=1e-3, atol=1e-4)
    latents = ((codes - mean) / std).float().movedim(-1, 2).detach()  # (n,8,d,h,w)
    n_classes = 1 if cfg.unconditional else 4
    labels = torch.arange(len(latents)) % n_classes
    torch.manual_seed(seed)
    net = vqldm.UNet(vq_cfg.z_dim, cfg.widths, n_classes, cfg.upsample)
    net.to(memory_format=torch.channels_last)
    ema, young, rates = copy.deepcopy(net), None, {adam(net.parameters()): cfg.lr}
    for i, rows, progress, factor in steps_of(cfg, train):
        gen = rng(seed, "step", i)
        if cfg.balance:
            chance = 1 / torch.bincount(labels[train])[labels[train]]
            rows = train[torch.multinomial(chance, B, True, generator=gen)]
        turns = torch.randint(8, (B,), generator=gen)
        t = torch.randint(0, cfg.T, (B,), generator=gen)
        eps = torch.randn(B, *latents.shape[2:], generator=gen)
        label = torch.where(torch.rand(B, generator=gen) < 0.1, n_classes, labels[rows])
        loss = losses_of(cfg, net, latents[rows, turns], t, eps, label)
        if i % 10 == 9:
            logged = float(loss.mean().detach())
        if cfg.target == "v":
            a = Diffusion(cfg.T, cfg.schedule).alpha_bar[t]
            loss = loss * (2 * (a * (1 - a)).sqrt()).clamp(min=0.25)
        step_along(net, loss.mean(), rates, factor)
        keep = min(cfg.ema, (1 + i) / (10 + i))
        for m, p in zip(ema.parameters(), net.parameters()):
            m.data = keep * m.data + (1 - keep) * p.data
        young = copy.deepcopy(ema) if progress < 0.2 else young
    z0 = latents[val, 0]
    t = torch.linspace(0, cfg.T - 1, len(val)).long()  # each image has another noise level
    eps = torch.randn(z0.shape, generator=rng("held-out noise"))
    of_net, of_mean = [losses_of(cfg, m, z0, t, eps, labels[val]).detach() for m in (net, ema)]
    return net, ema, young, of_net, of_mean, logged


def test_reference_stage_2_ends_with_the_programs_weights_and_log(runs):
    """A validation takes the loss of the running mean, and the std of 16 samples made in at most
    25 steps."""
    net, ema, young, of_net, of_mean, loss = plain_ldm(runs)
    for part, want in (("model", net), ("ema", ema), ("young", young)):
        assert_same_weights(runs.ldm[part], want, part)
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


def test_stage_2_can_have_images_of_its_own(trained, tmp_path, monkeypatch, printed):
    """It learns their classes. evaluate takes them, but not seen.bmp, which stage 1 has seen."""
    own, ldm = fill(tmp_path / "own", "a/0.bmp a/1.bmp b/2.bmp val/a/3.bmp"), tmp_path / "ldm"
    shutil.copy(next(Path("photos/train/mole").iterdir()), own / "val/a/seen.bmp")
    fill(own, [f"val/{c}/{i}.bmp" for c in "ab" for i in range(4)], (99, 9, 9))
    read = recorded(monkeypatch, vqldm, "read_images")
    state = train("ldm", ldm, "--epochs", 1, "--data", own)
    assert state["classes"] == ["a", "b"] and "WARNING" not in printed()
    assert torch.isin(state_of("trained/vq/last.pt")["seen"], state["seen"]).all()
    assert cli("evaluate", "--ckpt", ldm, "--n", 2) == 0
    assert cli("evaluate", "--ckpt", "trained/ldm", "--n", 2, "--out", ldm) == 0
    assert [call.cfg.data for call in read] == [str(own)] * 2 + [f"{trained.folder}/photos"]
    assert "to measure on: 9 unseen images" in printed()


# ---- 9. Sampling ---------------------------------------------------------------------------------
NAMES = ["$m\udcf6le, new", "É"]  # no names of files, and one that was a folder without UTF-8


@pytest.fixture()
def ldm(copy_of, empty_folder):
    """A copy of stage 2 in the folder ldm, with --eta .6 and with classes of these NAMES."""
    return copy_of("ldm", dict(eta=0.6, autoguidance=1.7), classes=NAMES)


TYPED = "--n 5 --class É --eta .2 --steps 2 --autoguidance 4 --class-guidance 3"
AS_TRAINED = ("--n 70", [0.6, 3, 1.7, 1.5], 35 * [0, 1], 27)
AS_TYPED = (TYPED, [0.2, 2, 4, 3], 5 * [1], 6)


@pytest.mark.parametrize("words, how, want, calls", [AS_TRAINED, AS_TYPED])
def test_sample_makes_images_of_all_classes_or_of_one(ldm, monkeypatch, words, how, want, calls):
    """They are made as was recorded, or as is typed, 64 at a time. With two classes, three networks
    answer in each step of a batch of 32."""
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "generate")
    asked = recorded(monkeypatch, vqldm.UNet, "forward")
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    assert cli("sample", "--ckpt", ldm, "--out", "a/new/folder", *words.split()) == 0
    assert len(asked) == calls and [*drawn[0].rows] == [NAMES[c] for c in sorted({*want})]
    for call in made:
        assert [getattr(call.settings, field.name) for field in fields(vqldm.Sampling)] == how
    assert [int(i) for call in made for i in call.ids] == [*range(len(want))]
    assert [c for call in made for c in call.label.tolist()] == want


def test_samples_can_be_read_as_a_folder_even_if_the_command_is_stopped(ldm, load, monkeypatch):
    """metadata.csv names their classes, which here come in threes, so that 64 are not full rounds.
    It is read before each batch is made, and by then the rows of all images so far are on the
    disk."""
    monkeypatch.setattr(vqldm, "wanted_classes", lambda *a: torch.tensor([0, 1, 1]))
    table, rows = fill(Path("new")) / "metadata.csv", []  # an empty folder may be there
    look = "generate", lambda call: rows.append(table.read_text("utf8").splitlines())
    made = recorded(monkeypatch, vqldm.LatentDiffusion, *look)
    assert cli(*"sample --ckpt ldm --out new --n 70".split()) == 0
    assert rows == [["file_name,class"], table.read_text("utf8").splitlines()[:65]]
    images = load("new", size=32)  # without grid.png, sorted by name, and so by number
    assert_equal(images.pixels[:], torch.cat([call.result[0] for call in made]))
    assert classes_of(images) == (["$m?le, new", "É", "É"] * 24)[:70]
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
def test_lpips_is_squeezenets_with_the_weights_that_its_authors_learned(printed, lpips):
    """Random weights would have nearly the sum 0, and a distance could be negative."""
    assert "Fire" in repr(lpips) and not printed()  # only SqueezeNet has these blocks
    assert sum(float(p.sum()) for p in lpips.lins.parameters()) == pytest.approx(173.44, abs=0.01)


def test_lpips_is_frozen_and_passes_gradients_to_images(lpips):
    """It has dropout, which must be off."""
    assert not any(p.requires_grad for p in lpips.parameters())
    assert "Dropout" in repr(lpips) and not any(m.training for m in lpips.modules())
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
    x, k = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 1).long()
    perfect = SimpleNamespace(
        codebook=vqldm.Codebook(1, 3), encode=lambda x: k, decode=lambda k: 2 * x
    )
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


def test_a_share_of_the_groups_is_held_out_as_a_whole():
    """The last four digits of a group's number decide, so a larger share contains a smaller one.
    Images in folders called val or test are held out at any share."""
    group = 3 * torch.arange(20_000).repeat(2)  # 3 x takes on all values of four digits
    images = images_with_ids(torch.arange(40_000) + 100_000, group, group == 3 * 9999)
    for share in (0, 0.0001, 0.1, 0.25, 0.5):
        train, val, seen = vqldm.split(images, share)
        held = (group % 10_000 < 10_000 * share) | images.test
        assert_equal(val.sort().values, held.nonzero()[:, 0])
        assert_equal(train, (~held).nonzero()[:, 0])
        assert_equal(seen, torch.cat([images.checksum[train], images.group[train]]).unique())
        assert share == 0 or not torch.equal(val, val.sort().values)  # their order is random


def test_what_was_ever_trained_on_is_not_held_out_and_not_forgotten(printed):
    """Image 1 and group 1001 have been seen. Image 1 is in the groups 4 and 8, so these are known,
    too. All but image 6 lie in a folder called test, but only image 5 can be held out."""
    content, group = [2, 3, 1, 4, 5, 6, 1], [1001, 8, 4, 4, 5, 6000, 8]
    images = images_with_ids(content, group, [1, 1, 1, 1, 1, 0, 1])
    train, val, seen = vqldm.split(images, 0.1, torch.tensor([1, 1001, 77]))
    assert (train.tolist(), val.tolist(), seen.tolist()) == ([5], [4], [1, 6, 77, 1001, 6000])
    assert "to train on: 1 images: {'b': 1}\nheld out: 1 images: {'a': 1}\n" in printed()


def test_training_and_unseen_images_never_share_a_group_or_a_content(printed):
    """In 300 tables, drawn at random, in which contents come twice, in several groups, in folders
    called test, and in what an earlier stage has seen."""
    splits = 0
    for key in range(300):
        gen, n = rng("tables", key), 12 + key % 9
        content, patient = torch.randint(14, (2, n), generator=gen)
        group = torch.where(torch.rand(n, generator=gen) < 0.6, 10_000 + 7919 * patient, content)
        images = images_with_ids(content, group, torch.rand(n, generator=gen) < 0.1)
        earlier = torch.cat([content, group])[torch.randint(2 * n, (key % 4,), generator=gen)]
        with suppress(vqldm.UserError):  # too few groups
            train, val, seen = vqldm.split(images, 0.3, earlier)
            splits += 1
            for ids in (images.checksum, images.group):
                assert not torch.isin(ids[val], ids[train]).any()
                assert not torch.isin(ids[val], earlier).any()
            assert_equal(val.sort().values, (~images.known(seen)).nonzero()[:, 0])
    assert splits > 200


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


def test_a_batch_may_span_several_epochs():
    """The reference of section 4 has the usual case, in which a batch is shorter than an epoch."""
    epochs = torch.cat([vqldm.next_rows(3, step, 10, 0) for step in range(6)]).view(20, 3)
    assert_equal(epochs.sort().values, torch.arange(3).expand(20, 3))


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
    for name, mode in (("0.bmp", "L"), ("4.png", "LA"), ("5.tif", "CMYK"), ("6.tiff", "P")):
        Image.open(folder / name).convert(mode).save(folder / name)
    images = load(folder)
    assert classes_of(images) == ["images"] * 10 + ["a", "b", "images"]
    assert len(images.pixels[:].unique(dim=0)) == 13
    assert images.pixels[10:, 0, 8, 3].tolist() == [10, 11, 12]  # red counts up, see fill


def test_what_is_no_image_is_not_opened_or_skipped(tmp_path, load, printed, monkeypatch):
    """Hidden files and other formats are not opened, but the latter are counted by their endings.
    Links to folders are not followed. There is a WARNING of an image that ends too early, of three
    that would be black or white, of one so large that PIL calls it a bomb, and of PostScript called
    x.png, for which PIL would start Ghostscript. The images around them keep their classes."""
    folder = fill(tmp_path / "photos", "a/1.png cut.jpg z/2.png", size=(200, 200))
    rest = "a.txt .git/x.png b.heic c.HEIF d.avif e.jp2 f.mpo g.jxl .hidden.png a/.b/c/1.png png"
    for name in [*rest.split(), "c/text.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    (folder / "album.jpg").mkdir()
    (folder / "a/up").symlink_to("..")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.new("F", (9, 9)).save(folder / "floats.tiff")
    for name, order in (("deep.png", "<"), ("deep.tif", ">")):
        Image.fromarray(np.zeros((9, 9), f"{order}u2")).save(folder / name)
    Image.new("L", (400, 400)).save(folder / "giant.png")
    Image.new("RGB", (9, 9)).save(folder / "x.eps")
    (folder / "x.eps").rename(folder / "x.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript := Mock(side_effect=OSError))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    images = load(folder)
    bad = "c/text.jpg cut.jpg deep.png deep.tif floats.tiff giant.png x.png".split()
    told = printed()
    assert re.findall(r"WARNING skipped '(\S+)' \(", told) == bad and not ghostscript.called
    assert "not read: 1 .txt, 1 .heic, 1 .heif, 1 .avif, 1 .jp2, 1 .mpo, 1 .jxl, 1 without" in told
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


def test_the_cache_notices_folder_group_class_size_pillow_and_code(
    tmp_path, decoded_anew, monkeypatch
):
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
    monkeypatch.setattr(vqldm, "read_image", lambda *a: torch.zeros(3, 16, 16).byte())
    assert not decoded_anew(folder).pixels[:].any()
    for part in (None, vqldm.decode_images, vqldm.Images):  # None: no part has changed
        monkeypatch.setattr(inspect, "getsource", lambda one, part=part: str((one, one is part)))
        decoded_anew(folder)


def test_the_cache_notices_the_colours_and_the_code_of_drawn_images(decoded_anew, monkeypatch):
    """The same ones are always held out, because an image is marked by its seed and number."""
    grey, images = dict.fromkeys(vqldm.LESIONS, ("808080 " * 4, 0, 0)), []
    for name, new in dict(n=1, SKIN="ffffff " * 5, LESIONS=grey, synthetic=lambda *a: 99).items():
        monkeypatch.setattr(vqldm, name, new, raising=False)
        images.append(decoded_anew("synthetic", n_images=4))
    assert len(torch.cat([x.pixels[:] for x in images]).unique(dim=0)) == 13
    assert all(torch.equal(x.group, images[0].group) for x in images)


def test_a_damaged_cache_is_refused(tmp_path, load):
    """It may be cut, or hold objects, which may run code."""
    load(folder := fill(tmp_path / "all", "1.bmp"))
    (path,) = (tmp_path / "cache").iterdir()
    torch.save({**state_of(path), "classes": [Path("x")]}, tmp_path / "harmful")
    for content in (path.read_bytes()[:-50], (tmp_path / "harmful").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(vqldm.UserError, match="cache.*is damaged, delete it"):
            load(folder)


def test_a_folder_or_file_that_cannot_be_opened_ends_the_run(tmp_path, load, monkeypatch, refused):
    """If it were skipped, a class might be missing. Next time it is there."""
    locked = PermissionError(13, "no", "out of memory.bmp")  # a name that says what is looked for
    places = {"os.scandir": locked, "pathlib.Path.read_bytes": locked}
    for place, error in {**places, "PIL.Image.open": MemoryError()}.items():
        folder = fill(tmp_path / place, "a/1.bmp b/1.bmp b/val/2.bmp")
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            told = refused("train-vq", "--size", 32, "--data", folder, "--out", tmp_path / "vq")
        assert "out of memory" in told and len(load(folder, size=32).labels) == 3


# ---- C. A folder of images: classes and groups ---------------------------------------------------
def test_folders_tell_the_class_and_what_is_held_out(tmp_path, load):
    """The class is the innermost folder that is not called train, val or so (`latest` is a class,
    although it ends in test). Folders above the one that is read do not count. If a table tells the
    classes, folders still tell what is held out."""
    want = {"a.bmp": ("images", False), "testing/a.bmp": ("images", True)}
    for part in "Test testing VALID val validation training Train".split():
        for kind in ("basal cell carcinoma", "latest", "runs"):
            for place in (f"x/{part}/{kind}", f"{kind}/{part}"):
                want[f"{place}/1.bmp"] = kind, part not in ("training", "Train")
    names = sorted(want)
    images = load(folder := fill(tmp_path / "Skin/test", names))
    assert [*zip(classes_of(images), images.test.tolist())] == [want[name] for name in names]
    table = "\n".join(["file_name,class", *[f"{name},mole" for name in names]])
    (folder / "metadata.csv").write_text(table)
    assert_equal(load(folder).test, images.test)


def test_a_group_is_a_patient_a_lesion_a_group_or_all_copies_of_an_image(tmp_path, load, printed):
    """They are known by their names in the first of these columns that an image fills, and images
    by their content."""
    names = "0.bmp 1.bmp 2.bmp 3.bmp copies/2.bmp copies/3.bmp".split()
    folder = fill(tmp_path / "all", names)
    shutil.copy(folder / "2.bmp", folder / "copies")
    ids = "patient_id,lesion_id,group", "P,L,", ",L,G", ",,", ",,G", ",,", "P,,G"
    rows = [",".join(pair) for pair in zip(["file_name", *names], ids)]
    (folder / "metadata.csv").write_text("\n".join(rows))
    content = [hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    patient, lesion, group = ("patient_id", "P"), ("lesion_id", "L"), ("group", "G")
    images = load(folder)
    assert images.checksum.tolist() == [vqldm.digest(one) for one in content]
    keys = patient, lesion, content[2], group, content[2], patient
    assert images.group.tolist() == [vqldm.digest(key) for key in keys]
    told = "classes by folder - images split by {'patient_id': 2, 'lesion_id': 1, 'image': 2, "
    assert f"{told}'group': 1}}\ndata {folder} 6 images in 4 groups\n" in printed()


PHOTOS = "a.bmp b.bmp nevus/c.bmp nevus/d.bmp twice.bmp scar/twice.bmp"
TABLES = [  # a table, in which | begins a line, the classes in the order of paths, what is printed
    # Blanks around words do not count, and images without a row are left out.
    (
        " file_name , class ,patient_id|a.bmp, mole ,P|b.bmp,scar,||,,|nevus/d.bmp,,P",
        ["mole", "scar", "unknown"],
        "metadata.csv names 3 of 6 images, and only these are used\nclasses by class -",
    ),
    # Columns have any order, and words in quotes may have commas.
    (
        'class,file_name|unknown,scar/twice.bmp|na, "nevus/c.bmp"|"mole, ""dark"" one",a.bmp',
        ['mole, "dark" one', "na", "unknown"],
        "classes by class -",
    ),
    # Folders are the classes if no row has one.
    (
        "file_name,class,group|a.bmp,,G|nevus/c.bmp,,",
        ["images", "nevus"],
        "classes by folder - images split by {'group': 1, 'image': 1}",
    ),
]
REFUSED_TABLES = {  # a table, and what the sentence names that refuses it
    "image,class|a.bmp,scar": "['image', 'class']",
    "file_name,class,Patient ID|a.bmp,scar,P": "['file_name', 'class', 'Patient ID']",
    "file_name,class,class|a.bmp,scar,scar": "['file_name', 'class', 'class']",
    "file_name;class|a.bmp;scar": "['file_name;class']",
    "": "['']",
    "file_name|a.bmp|b.bmp|a.bmp": "a.bmp",  # has two rows
    "file_name|a.bmp|c.bmp|b.bmp": "['c.bmp']",
    "file_name,class|a.bmp,mole,dark": "['a.bmp', 'mole', 'dark']",
    "file_name,class|a.bmp": "['a.bmp']",
    'file_name,class|a.bmp,mole|b.bmp,"scar': "unexpected end of data",  # an open quote
    "file_name,class|a.bmp,\udce9": "UnicodeDecodeError",  # é as older systems write it
    "file_name,patient_id|a.bmp,P|b.bmp,NaN": "patient_id 'NaN'",
    "file_name,lesion_id|a.bmp,NA": "lesion_id 'NA'",
    "file_name,group|a.bmp,-": "group '-'",
}


@pytest.fixture()
def with_table(tmp_path, load):
    """A function that reads a folder of PHOTOS with this table as its metadata.csv -> Images. The
    table begins with a byte order mark, as Excel writes it. Another table is not looked at."""

    def call(text):
        folder = fill(tmp_path / "my photos", PHOTOS)
        (folder / "other.csv").write_text("file_name,class\na.bmp,other\nb.bmp,other")
        text = "\ufeff" + text.replace("|", "\n")
        (folder / "metadata.csv").write_bytes(text.encode("utf8", "surrogateescape"))
        return load(folder)

    return call


@pytest.mark.parametrize("table, classes, told", TABLES)
def test_metadata_csv_tells_classes_and_groups(with_table, printed, table, classes, told):
    assert classes_of(with_table(table)) == classes and told in printed()


@pytest.mark.parametrize("table", REFUSED_TABLES)
def test_a_table_in_another_format_is_left_to_the_tool(tmp_path, with_table, table):
    with pytest.raises(vqldm.UserError) as e:
        with_table(table)
    told = str(e.value).removeprefix(f"{tmp_path}/my photos/metadata.csv: ")
    assert REFUSED_TABLES[table] in told
    assert f"ype python tools/table.py '{tmp_path}/my photos'" in told


@pytest.mark.parametrize("name", "labels.csv Metadata.CSV x.tsv x.xlsx a/metadata.csv".split())
def test_a_table_that_was_meant_is_not_overlooked(tmp_path, name):
    folder = fill(tmp_path / "photos", "0.bmp a/1.bmp")
    (folder / name).touch()
    with pytest.raises(vqldm.UserError, match=f"python tools/table.py {folder} {name}"):
        vqldm.find_images(folder)
    (folder / name).rename(folder / "a/other.csv")
    (folder / "~$labels.xlsx").touch()  # Excel makes it while labels.xlsx is open
    assert len(vqldm.find_images(folder)) == 2


# ---- D. Device, chance, processes ----------------------------------------------------------------
@pytest.mark.parametrize("gpu, dtype", [("meta", "float32"), (None, "bfloat16")])
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


def test_what_is_said_is_not_kept_back(monkeypatch):
    """Python would keep it back in a file, until there are some thousand letters."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO()))
    vqldm.say("half", "way")
    assert raw.getvalue() == b"half way\n"


def test_a_training_goes_on_if_nobody_reads_what_it_says(trained, tmp_path, monkeypatch):
    """As in `train-vq | head -3`, where the pipe is closed after three lines, or if the terminal is
    gone. stderr, on which bars are drawn, may be closed from the start."""
    monkeypatch.setattr(sys, "stdout", Mock(flush=Mock(side_effect=BrokenPipeError)))
    monkeypatch.setattr(sys, "stderr", None)
    assert train("vq", tmp_path / "vq", "--epochs", 0.5)["step"] == 3


def test_a_process_of_torchrun_knows_its_number_and_takes_its_gpu(monkeypatch):
    """It is process 5 of 8, and the second one on its machine, so it takes GPU 1 before it meets
    the others. Batch systems set such variables, too, but without torchrun's own one there is a
    single process."""
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
    validations = [
        f"{row['step'] / 12:4.0%} val: "
        + " ".join(f"{name[4:]} {value:.4g}" for name, value in row.items() if name != "step")
        for row in trained.validations[stage]
    ]
    kind, following = "samples", "sample --ckpt"
    if stage == "vq":
        kind, following = "recon", "train-ldm --preset default --vq"
    drawn = [str(call.path) for call in trained.drawn]
    assert f"trained/{stage}/{kind}_step_000012.png" in drawn
    assert trained.drawn[-1].rows["samples"].shape == (16, 3, 32, 32)
    assert trained.printed[stage].splitlines() == [
        "device cpu, with matrix products in float32",
        *(["from trained/vq/last.pt at step 12 of 12"] if stage == "ldm" else []),
        "classes by folder - images split by {'image': 48}",
        f"data {trained.folder / 'photos'} 48 images in 48 groups",
        "to train on: 30 images: {'mole': 20, 'scar': 10}",
        "held out: 18 images: {'mole': 12, 'scar': 6}",
        "steps to go: 12 of 12",
        *validations,
        f"look at trained/{stage}/{kind}_step_000012.png and trained/{stage}/curves.png",
        f"next: python vqldm.py {following} trained/{stage}",
    ]


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
STOPS = [("vq", 0, INT), ("vq", 5, TERM), ("vq", 11, HUP), ("ldm", 2, INT), ("ldm", 9, TERM)]


def handlers():
    """What Ctrl-C, SIGTERM and SIGHUP do."""
    return [signal.getsignal(one) for one in (INT, TERM, HUP)]


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_signal_ends_a_training_after_its_step(tmp_path, printed, number):
    """The exit status tells which one it was. A second Ctrl-C would end the program at once.
    Afterwards all three do what they did before."""
    usual, run = handlers(), vqldm.Run(vqldm.VQConfig(out=str(tmp_path)), 800, {}, None)
    for _ in run:
        signal.raise_signal(number)
        assert handlers()[0] == signal.default_int_handler
        run.end_step({})
    assert handlers() == usual and run.step == 1
    with pytest.raises(SystemExit, match=f"^{128 + number}$"):
        run.finish("recon", "train-ldm")
    told = "saved at step 1 -- to go on, type the same command with --resume"
    assert printed().splitlines() == ["steps to go: 300 of 300", told]


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
    words = ["--out", out, "--epochs", epochs, "--data", photos, "--autoguidance", 2]
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
SAMPLED_OTHERWISE = "--eta .5 --steps 9 --autoguidance 2.5 --class-guidance 3.5"
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
        ("vq", 4, "began with LPIPS and can't", dict(lpips_weight=1), dict(lpips=True), no_lpips),
        ("vq", 4, "began without LPIPS and can't", dict(lpips_weight=1), {}, with_lpips),
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
        ("torch.load", "out of memory", MemoryError),
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
    for flag in ("--vq", "--ckpt", "--resume"):
        vqldm.load_checkpoint(vq, flag, "vq")
    rest = f"{vq}/last.pt at step 3 of 12\n"
    assert printed() == 2 * f"WARNING unfinished: {rest}" + f"from {rest}"


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


def test_a_validation_is_saved_before_it_is_drawn(trained, tmp_path, monkeypatch, refused):
    """So a full disk costs less. Here the picture of the second validation finds it full."""
    monkeypatch.setattr(vqldm, "draw_rows", Mock(side_effect=[None, OSError(28, "No space")]))
    assert "No space" in refused(*STAGES["vq"], "--epochs", 2.5, "--out", tmp_path)
    assert state_of(tmp_path / "last.pt")["step"] == 3


# ---- F. Pictures ---------------------------------------------------------------------------------
@pytest.mark.parametrize("side, times", [(8, 2), (63, 2), (64, 1)])
def test_rows_of_pictures_are_drawn_under_their_names(tmp_path, side, times):
    """At most 16 in a row, on white, and twice as large below 64 pixels. A row without images is
    left out. README's pictures have labels of 14 pixels and lines of two, so new ones must."""
    images = torch.randint(256, (20, 3, side, side), generator=rng("rows")).byte()
    path, rows = tmp_path / "new/grid.png", {"p": images[:3], "none": images[:0], "many": images}
    ORIGINAL.draw_rows(path, rows)
    side, images = side * times, images.repeat_interleave(times, 2).repeat_interleave(times, 3)
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


# ---- H. Commands ---------------------------------------------------------------------------------
FOLDERS = {"one": "a.bmp", "b-in-val": "a/0.bmp val/b/3.bmp", "none": ""}
MISTAKES = [  # a command, and what the sentence says that refuses it
    ("train", "train: is no command, see --help and tools/evaluate.py"),
    ("train-vq --data photos --out photos", "--out photos: holds the images; name another"),
    ("train-vq --size 40", "--size: must be a multiple of 16 above 16"),
    ("train-vq --size 16", "--size: must be a multiple of 16 above 16"),
    ("train-vq --size 48 --widths 8,8,8,8,8", "--size: must be a multiple of 128 above 16"),
    ("train-vq --device cuda:77", "--device cuda:77: cannot be used here, --device cpu can"),
    ("train-vq --data nowhere", "[Errno 2] No such file or directory: '{}/nowhere'"),
    ("train-vq --data none", "--data {}/none: no usable image is there, not read: nothing"),
    ("train-vq --data trained/vq", "--data {}/trained/vq: is a run, not a folder of images"),
    ("train-vq --data one --held-out 0", "--held-out, --data, --n-images: too few groups to split"),
    ("train-vq --out trained/vq", "--out trained/vq: holds a run; --resume it, or name another"),
    ("train-vq --out one/a.bmp --data photos", "one/a.bmp"),
    ("train-vq --resume", "--resume runs/vq/last.pt: no checkpoint is there. Run train-vq first"),
    ("train-ldm", "--vq runs/vq: no checkpoint is there. Run train-vq first"),
    ("train-ldm --vq trained/ldm", "--vq trained/ldm: is not of train-vq"),
    ("train-ldm --vq trained/vq --T 1 --schedule linear", "--T: too few levels to end in noise"),
    ("train-ldm --vq trained/vq --eta 1.1", "--eta 1.1: must be from 0 to 1"),
    ("train-ldm --vq trained/vq --ema 1.1", "--ema 1.1: must be from 0 to 1"),
    ("train-ldm --vq trained/vq --data b-in-val", "--data: no image to train on of ['b']"),
    ("sample", "--ckpt runs/ldm: no checkpoint is there. Run train-ldm first"),
    ("sample --ckpt ~no-such-user/x", "--ckpt ~no-such-user/x: no checkpoint is there"),
    ("sample --ckpt trained/ldm --class Mole", "--class Mole: choose one of ['mole', 'scar']"),
    ("sample --ckpt trained/ldm --out one", "--out one: is not empty; name a new folder"),
    ("classifier trained/ldm 4 wart", "CLASS wart: choose from ['mole', 'scar']"),
    ("classifier trained/vq 4 scar", "RUN trained/vq: is not of train-ldm"),
    ("evaluate --ckpt trained/ldm --folders one", "--folders one: is not empty; name a new folder"),
    ("evaluate --ckpt trained/ldm --data one --out one", "--out one: holds the images; name"),
    ("evaluate --ckpt trained/ldm --n 1", "--n 1: must be at least 2, since pairs of images"),
    ("evaluate --ckpt trained/ldm --data one", "--class, --data: 0 unseen images are too few, 4"),
]


@pytest.mark.parametrize("command, told", MISTAKES)
def test_a_mistake_ends_in_one_sentence(trained, empty_folder, monkeypatch, refused, command, told):
    """Nothing is written but a cache of images, and no run is lost. No image is drawn."""
    monkeypatch.setattr(vqldm, "synthetic", lambda *a: 1 / 0)
    for name, names in FOLDERS.items():
        fill(Path(name), names)
    for name in ("trained", "photos"):
        Path(name).symlink_to(trained.folder / name)

    def files():
        paths = itertools.chain(trained.folder.rglob("*.*"), empty_folder.rglob("*.*"))
        return {path: path.read_bytes() for path in paths if "cache" not in path.parts}

    before = files()
    assert told.format(empty_folder) in refused(*command.split())
    assert files() == before


WRONG = {  # settings of train-vq, and the sentence that refuses them
    "--codes 0": "--codes 0: must be at least 1",
    "--codes 1.5": "--codes 1.5: must be a whole number",
    "--codes 1000000000000000001": "--codes 1000000000000000001: must be from 1 to 1e+18",
    "--lr x": "--lr x: must be a number",
    "--lr nan": "--lr nan: must be at least 0",
    "--lr inf": "--lr inf: must be from 0 to 1e+30",
    "--held-out .7": "--held-out .7: must be from 0 to 0.5",
    "--size 65537": "--size 65537: must be from 1 to 65536",
    f"--seed {2**64}": f"--seed {2**64}: must be from -9.22337e+18 to 1.84467e+19",
    "--n-images 1000000001": "--n-images 1000000001: must be from 1 to 1e+09",
    "--epochs 0": "--epochs 0: must be from 1e-06 to 1e+06",
    "--widths 16,0": "--widths 16,0: must be whole numbers such as 16,64",
    "--data=": "--data : must be a folder",
    "--epoch 3": "--epoch: is unknown. Did you mean --epochs?",
    "--seed 3 --guidance 7.5 --epoch 3": "--guidance: is unknown. Did you mean --help?",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_setting_is_told_what_it_must_be(refused, words):
    assert refused("train-vq", *words.split()) == f"vqldm: {WRONG[words]}\n"


def test_the_outermost_settings_are_allowed():
    """What lies beyond is refused, see WRONG."""
    words = f"--codes 1 --codes {10**18} --lr 0 --lr 9.9e29 --held-out .5 --size 65536 "
    words += f"--seed {2**64 - 1} --n-images 1000000000 --epochs 1e-6"
    vqldm.parser_of("train-vq", vqldm.VQConfig).parse_args(words.split())


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


def test_a_class_is_meant_by_exactly_its_name():
    cfg = vqldm.SampleConfig(class_="a")
    assert vqldm.wanted_classes(cfg, ["A", "an a", "a"]).tolist() == [2]


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
    ("train-ldm --resume --out ldm --steps 9", dict(steps=9, T=5, widths=(12,), autoguidance=1.5)),
    ("sample --ckpt ldm/last.pt --steps 50 --seed 4", dict(steps=50, seed=4, eta=0.0, n=64)),
    ("evaluate --ckpt ldm --autoguidance 2", dict(autoguidance=2.0, steps=3, n=500, data="")),
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
    "--epochs 27 --eta 0 --steps 50 --autoguidance 1.5 --class-guidance 1.5",
    "train-vq --preset tiny": "--size 32 --n-images 200 --widths 16,32 --codes 64 --epochs 4",
    "train-ldm --preset tiny": "--T 200 --widths 32,64 --batch-size 16 --epochs 16",
    "train-vq --preset quick": "--n-images 800 --held-out .05 --epochs 2.4",
    "train-ldm --preset quick": "--epochs 19",
    "train-vq --preset report": "--upsample transposed --lpips-weight 1 --commit-weight 1 "
    "--gan-weight 1 --lam-max 10000 --gan-start .267 --epochs 30 --lr .0003 --muon-lr 0 "
    "--codes-lr .0003 --d-lr .0003",
    "train-ldm --preset report": "--upsample transposed --unconditional --target eps "
    "--schedule linear --eta 1 --steps 1000 --autoguidance 1 --class-guidance 1",
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
    shell = "".join(blocks("sh", "\n".join(PAGES.values())))
    commands = re.findall(r"python (vqldm|tools/\w+)\.py([^\n&]*)", shell)
    assert len(commands) == len(re.findall("vqldm.py|tools/", shell)) and "#" not in shell
    for program, words in commands:
        words = program.removeprefix("tools/").replace("vqldm", "") + words
        settings_of(words) if words[0] == " " or "evaluate" in words else cli(*words.split())


def test_each_flag_that_the_pages_name_exists(printed):
    for words in (["train-vq"], ["train-ldm"], ["sample"], ["evaluate"], ["table"]):
        assert cli(*words, "--help") == 0
    pages = "".join(text for name, text in PAGES.items() if name != "TEACHING.md")
    others = "--index-url --nproc-per-node --install --depth --collections --search --limit --cpu "
    others += "--kid --kid-subset-size --input1 --input2"  # of other programs
    named = {*re.findall(r"(?<![\w-])--[a-z][\w-]+", pages)}
    assert named <= {*re.findall(r"--[\w-]+", printed()), *others.split()}


def test_readmes_excerpt_is_of_the_program():
    """Comments and empty lines may differ."""
    texts = *blocks("python", section("README.md", "How it works")), inspect.getsource(vqldm)
    excerpt, code = [re.sub("\n+", "\n", without_comments(text)) for text in texts]
    assert excerpt.strip("\n") in code and excerpt.count("\n") > 1


def test_readmes_example_runs_and_seeds_nothing(copy_of, empty_folder, monkeypatch):
    """Loading a model must not change the caller's random numbers by a seed."""
    copy_of("ldm", classes=["mole", "nevus-like"]).rename(fill(Path("runs")) / "ldm")
    torch.manual_seed(7)
    devices = recorded(monkeypatch, vqldm, "pick_device")
    (code,) = blocks("python", section("README.md", "From Python"))
    exec(code, there := {})
    assert [call.name for call in devices] == ["auto"] and torch.initial_seed() == 7
    assert there["images"].shape == there["recon"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("heading", re.findall("^### (.*)", PAGES["CHANGING.md"], re.M))
def test_each_change_of_changing_passes_its_check(empty_folder, monkeypatch, heading):
    """A part of its diff stands once in the program, if comments do not count."""
    text = section("CHANGING.md", heading)
    (diff,), (check,) = blocks("diff", text), blocks("python", text)
    lines = Path(vqldm.__file__).read_text(encoding="utf8").split("\n")
    for _, *part in [hunk.split("\n") for hunk in diff.strip().split("@@ ")[1:]]:
        old = [without_comments(line[1:]) for line in part if line[:1] in ("-", " ")]
        plain = [without_comments(line) for line in lines]
        (at,) = [i for i in range(len(lines)) if plain[i : i + len(old)] == old]
        lines[at : at + len(old)] = [line[1:] for line in part if line[:1] != "-"]
    Path("vqldm.py").write_text("\n".join(lines), encoding="utf8")
    spec = importlib.util.spec_from_file_location("vqldm", "vqldm.py")
    spec.loader.exec_module(changed := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(changed, "load_lpips", lambda device: None)
    monkeypatch.setitem(sys.modules, "vqldm", changed)
    exec(check, {})


# ---- tools/evaluate.py ---------------------------------------------------------------------------
@pytest.mark.parametrize("side", [64, 300])
def test_features_are_the_means_of_the_last_map_of_lpips(lpips, side):
    """Images are brought to 224×224 pixels. Larger ones are smoothed first, to avoid aliasing."""
    few = (60 * randn(2, 3, side, side).clamp(-2, 2) + 128).byte()
    images = few[[0] + 5 * [1]]  # six images need more than one batch
    x = F.interpolate(few / 255 * 2 - 1, (224, 224), mode="bilinear", antialias=True)
    want = lpips.net(lpips.scaling_layer(x))[-1].mean((2, 3))
    assert want.shape == (2, 512)
    assert_close(evaluate.features(lpips, images)[[0, 5]].float(), want, rtol=1e-4, atol=1e-5)


def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    """No image is paired with itself, nor with the one that has its place in the other set."""
    a, b = randn(5, 3).double(), randn(5, 3, key=1).double() + 1
    want = 0
    for u, v, sign in ((a, a, 1), (b, b, 1), (a, b, -2)):
        for i, j in itertools.permutations(range(5), 2):
            want += sign * float(u[i] @ v[j] / 3 + 1) ** 3 / 20
    assert evaluate.kernel_distance(a, b) == pytest.approx(want)


@pytest.mark.parametrize("n, rows", [(300, [7, 255, 256, 257, 299, 0]), (256, [0, 255]), (1, [0])])
def test_the_nearest_training_image_is_found_in_all_symmetries(n, rows):
    """Training images are searched in parts of 256. One picture is no copy, and a search in float64
    tells its distance. The others are turned copies of these rows. All come 50 times."""
    pixels = torch.randint(256, (301, 3, 128, 128), generator=rng(1)).byte()
    small = pixels.double().unflatten(3, (32, 4)).unflatten(2, (32, 4)).mean((3, 5)) / 127.5 - 1
    every = np.stack([symmetries(x) for x in small[1 : n + 1].numpy()])
    away = np.sqrt(((every - small[0].numpy()) ** 2).sum((2, 3, 4)).min(1))
    turned = vqldm.augment(pixels[1:][rows], torch.arange(len(rows)) + 1)
    pictures = torch.cat([pixels[:1], turned] * 50)
    distance, row = evaluate.nearest_trained(pictures, pixels[1 : n + 1])
    assert row.tolist() == [away.argmin(), *rows] * 50
    assert distance[0] == pytest.approx(away.min(), rel=1e-4)
    assert distance[1 : 1 + len(rows)].max() < 0.1


def with_unseen_images(trained, folder):
    """Make a copy of stage 2 in folder/ldm, and 52 photographs in folder/all. The model has seen 36
    of them. Of the others, two show patient P, who is known, and two show acne, a class that the
    model does not have. So 12 are unseen: six moles, of which one is a training image, saved again
    with another pixel, and six scars, which are greener, one by far. The result has the pixels of
    the 36 images, and a function that tells which images are green."""
    photos = shutil.copytree(trained.folder / "photos/train", folder / "all/train").parent
    seen = sorted(photos.rglob("*.bmp"))
    checksums = [vqldm.digest(hashlib.sha256(path.read_bytes()).digest()) for path in seen]
    known = torch.tensor([*checksums, vqldm.digest(("patient_id", "P"))])
    copy_stage(trained, folder, "ldm", seen=known, step=11)
    fill(photos, [f"mole/{i}.bmp" for i in range(7)], (180, 120, 90))
    fill(photos, [f"scar/{i}.bmp" for i in range(7)], (200, 140, 90))
    fill(photos, ["scar/6.bmp"], (190, 250, 190))
    fill(photos, "acne/a.bmp acne/b.bmp")
    with Image.open(seen[0]) as again:
        again.putpixel((0, 0), (9, 9, 9))
        again.save(photos / "mole/6.bmp")
    rows = [f"{p.relative_to(photos)},{'P' * (p.stem == '0')}" for p in photos.rglob("*.bmp")]
    (photos / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    pixels = torch.stack([vqldm.read_image(path.read_bytes(), 32) for path in seen])
    return SimpleNamespace(seen=pixels, are_green=lambda x: (x[:, 1, 20, 20] > 130).tolist())


@pytest.fixture(scope="module")
def evaluation(trained, tmp_path_factory):
    """What evaluate says of nine samples, of which four are really training images. Three of these
    are turned, and one has few colours."""
    folder, generate = tmp_path_factory.mktemp("evaluation"), vqldm.LatentDiffusion.generate
    e = with_unseen_images(trained, folder)

    def with_copies(self, settings, ids, label):
        pictures, z0 = generate(self, settings, ids, label)
        pictures[4:7] = vqldm.augment(e.seen[[7, 3, 30]] // 4 * 4, [2, 5, 0])
        pictures[8] = e.seen[9] // 12 * 12
        return pictures, z0

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        use_plain_cpu(patch)
        patch.chdir(folder)
        lpips = random_lpips(patch)
        patch.setattr(vqldm.LatentDiffusion, "generate", with_copies)
        patch.setattr(vqldm, "load_lpips", lambda device: lpips)
        patch.setattr(vqldm, "draw_rows", ORIGINAL.draw_rows)
        reconstruct, drawn = [recorded(patch, vqldm, x) for x in ("reconstruct", "draw_rows")]
        features = recorded(patch, evaluate, "features")
        e.nearest = recorded(patch, evaluate, "nearest_trained")
        e.told = recorded(patch, evaluate, "in_words")
        made = recorded(patch, vqldm.LatentDiffusion, "generate")
        words = "evaluate --ckpt ldm --data all --n 9 --autoguidance 2.5 "
        words += "--out new/results --folders new/folders"
        assert cli(*words.split()) == 0
    e.folder, e.printed, e.drawn, e.made = folder, out.getvalue(), drawn[0], made[0]
    e.numbers = json.loads((folder / "new/results/metrics.json").read_text())
    e.samples, e.latents = e.made.result
    e.real, e.other = [call.pixels for call in reconstruct]  # two sets of unseen images
    (e.measures, e.recon), (_, e.perfect) = [call.result for call in reconstruct]
    e.features = {call.pixels.numpy().tobytes(): call.result for call in features}
    return e


def test_evaluate_measures_two_halves_of_what_no_training_has_seen(evaluation):
    """Both have six images, in which the classes are mixed. Samples are of the classes of the first
    half, and made as is typed, or else as stage 2 was told when it was trained."""
    e, green = evaluation, evaluation.are_green
    assert len(e.real) == len(e.other) == e.numbers["unseen_images"] == 6
    assert len({*bytes_of(e.real), *bytes_of(e.other)}) == 12
    assert {*green(e.real)} == {True, False} and sum(green(e.real) + green(e.other)) == 6
    assert e.made.label.tolist() == [int(green(e.real)[i % 6]) for i in range(9)]
    assert (e.made.settings.steps, e.made.settings.autoguidance) == (3, 2.5)


def test_evaluate_writes_its_settings_and_measures(evaluation):
    """The kernels are distances from the first half."""
    e = evaluation
    want = dict(ckpt="ldm", data=str(e.folder / "all"), n=9, steps=3, autoguidance=2.5, class_="")
    want |= {**e.measures, "latent_std": float(e.latents.std()), "step": 11}
    sets = {"kernel": e.samples[:6], "kernel_perfect": e.perfect, "kernel_recon": e.recon}
    for name, images in {**sets, "kernel_real": e.other}.items():
        a, b = [e.features[one.numpy().tobytes()] for one in (e.real, images)]
        want[name] = evaluate.kernel_distance(a, b)
    assert {name: e.numbers[name] for name in want} == pytest.approx(want)
    assert e.told[0].gap == e.numbers["kernel"] - e.numbers["kernel_perfect"]
    assert (e.folder / "new/cache").is_dir()  # beside the folder of the results


def test_evaluate_prints_what_it_measures_on_and_all_that_it_measures(evaluation):
    e = evaluation
    told = {name: float(value) for name, value in re.findall(r"^(\w+) +(\S+)$", e.printed, re.M)}
    settings = {field.name for field in fields(evaluate.EvaluateConfig)}
    assert told.keys() == e.numbers.keys() - settings and len(told) == 17
    assert told == pytest.approx({name: e.numbers[name] for name in told}, rel=1e-3)
    assert "12 unseen images of known classes: {'mole': 6, 'scar': 6}\nWARNING each" in e.printed
    assert e.printed.splitlines()[-1].startswith("6 unseen images in each set are too few")


def test_evaluate_counts_near_copies(evaluation):
    """A near copy is closer to a training image than half the median distance of unseen images. So
    here are three samples, and the mole that was saved again. Half the mean distance is larger, as
    one image is far off, and a fourth sample is less far away than that."""
    e = evaluation
    (distance, _), (usual, _) = [call.result for call in e.nearest]
    assert_equal(e.nearest[0].pictures, e.samples)
    assert {*bytes_of(e.nearest[1].pictures)} == {*bytes_of(e.real), *bytes_of(e.other)}
    assert {*bytes_of(e.nearest[0].trained)} == {*bytes_of(e.seen)}
    assert sorted(usual)[5] / 2 < distance[8] < usual.mean() / 2
    half = sorted(usual.tolist())[5] / 2  # torch's median of 12 numbers is the sixth
    assert (distance < half).tolist() == [4 <= i < 7 for i in range(9)]
    want = dict(near_copies=3, near_copies_percent=100 / 3, near_copies_unseen=1)
    want |= dict(near_copies_unseen_percent=100 / 12, training_images_found=36)
    assert {name: e.numbers[name] for name in want} == pytest.approx(want)


def test_copies_are_sought_among_all_training_images(trained, tmp_path, monkeypatch):
    """Samples are compared with all of them, and so are 1,000 of the unseen images."""
    state = vqldm.load_checkpoint("trained/ldm", "", "ldm")
    many = images_with_ids(*[range(2300)] * 2)
    many.pixels, many.classes = torch.zeros(2300, 3, 32, 32).byte(), ["mole", "scar"]
    monkeypatch.setattr(vqldm, "read_images", lambda *a: many)
    nearest = Mock(side_effect=lambda a, b: (torch.ones(len(a)), torch.zeros(len(a)).long()))
    monkeypatch.setattr(evaluate, "nearest_trained", nearest)
    cfg = evaluate.EvaluateConfig(n=2, out=str(tmp_path))
    evaluate.evaluate(cfg, torch.device("cpu"), {**state, "seen": torch.arange(1100)})
    sizes = [tuple(map(len, call.args)) for call in nearest.call_args_list]
    assert sizes == [(2, 1100), (1000, 1100)]


def test_evaluate_draws_each_set_and_writes_it_into_a_folder(evaluation):
    """The worst copies are drawn first. The folders are for other programs, which compare them."""
    e = evaluation
    distance, row = e.nearest[0].result
    order = distance.argsort()
    want = dict(real=e.real, recon=e.recon, samples=e.samples)
    want["samples nearest to a training image"] = e.samples[order]
    want["that image"] = e.nearest[0].trained[row[order]]
    assert identical(e.drawn.rows, want) and [*e.drawn.rows] == [*want]
    assert e.drawn.path == Path("new/results/evaluate.png")
    assert sorted(os.listdir(e.folder / "new/folders")) == ["real", "recon", "samples"]
    for name in ("real", "recon", "samples"):
        paths = sorted((e.folder / "new/folders" / name).iterdir())
        written = [vqldm.pil_to_tensor(Image.open(path)) for path in paths]
        assert_equal(torch.stack(written), want[name])


@pytest.mark.parametrize("there, n, few", [(4, 9, 2), (39, 500, 19), (40, 500, 0), (99, 19, 19)])
def test_evaluate_warns_if_each_set_has_fewer_than_20_images(printed, there, n, few):
    """Two sets of one image would leave no pair to compare, so fewer than four are refused."""
    images, model = images_with_ids(*[range(there)] * 2), SimpleNamespace(classes=["a", "b"])
    cfg, seen = evaluate.EvaluateConfig(n=n), torch.tensor([-1])
    rows, _ = evaluate.unseen_images(cfg, model, images, seen)
    assert len(rows.diff().unique()) > there // 5  # in random order
    assert re.findall("WARNING .* only (.*) unseen images", printed()) == [str(few)] * (few > 0)
    with pytest.raises(vqldm.UserError, match="3 unseen images are too few, 4 are needed"):
        evaluate.unseen_images(cfg, model, images_with_ids([1, 2, 3], [1, 2, 3]), seen)


def test_evaluate_can_measure_one_class_on_the_same_images_at_any_seed(evaluation, monkeypatch):
    monkeypatch.chdir(evaluation.folder)
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "generate")
    read = recorded(monkeypatch, vqldm, "read_images")
    for seed in (0, 7):
        assert cli(*f"evaluate --ckpt ldm --data all --class scar --n 2 --seed {seed}".split()) == 0
    assert [call.cfg.seed for call in read] == [0, 0]  # drawn images stay those of stage 1
    assert_equal(calls[0].pixels, calls[1].pixels)
    assert evaluation.are_green(calls[0].pixels) == [True] * 2
    assert [call.label.tolist() for call in made] == [[1] * 2] * 2


def test_evaluate_needs_no_classes_no_training_images_and_no_lpips(trained, tmp_path, printed):
    """Copies and kernels are left out then. Without --out the results lie beside the checkpoint."""
    train("ldm", tmp_path / "ldm", "--unconditional")
    assert cli("evaluate", "--ckpt", tmp_path / "ldm/last.pt", "--data", "photos/val") == 0
    numbers = json.loads((tmp_path / "ldm/metrics.json").read_text())
    assert "12 unseen images of known classes: {'images': 12}" in printed()
    assert numbers["training_images_found"] == 0
    assert not [name for name in numbers if "kernel" in name or "near" in name]


def test_the_last_line_of_evaluate_says_what_kernel_means():
    """From how far kernel is above kernel_perfect, what chance does, and the number of images."""
    told = evaluate.in_words
    assert told(6.4, 0.8, 20).startswith("kernel is above kernel_perfect by 6.4, give or take 0.8.")
    assert told(0.6, 0.8, 300).startswith("300 images are too few to tell kernel from")
    assert told(-0.6, 0.8, 300).startswith("300 images are too few to tell kernel from")
    assert told(-2.6, 0.8, 300).startswith("kernel is below kernel_perfect by 2.6, give or take")
    assert told(99.0, 8.0, 19).startswith("19 unseen images in each set are too few to tell how")


def test_chance_is_how_much_the_gap_of_two_kernels_varies_from_set_to_set():
    """Of samples that are off by a third of a standard deviation. Perfect ones are not off."""
    found = []
    for i in range(30):
        real, made, perfect = randn(3, 40, 4, key=("sets", i)).double()
        made = made + 0.33
        gap = evaluate.kernel_distance(real, made) - evaluate.kernel_distance(real, perfect)
        found.append(evaluate.gap_and_chance(real, made, perfect))
        assert found[-1][0] == gap
    gap, chance = torch.tensor(found).T
    assert 0.8 < chance.mean() / (2 * gap.std()) < 1.5


# ---- tools/table.py ------------------------------------------------------------------------------
def photos(names, **tables):
    """Make empty files of these names in photos/, as tools/table.py looks at names only, and tables
    of these texts, in which | begins a line."""
    for name in names.split(" & "):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).touch()
    for name, text in tables.items():
        data = text if isinstance(text, bytes) else text.replace("|", "\n").encode()
        Path("photos", name.replace("_csv", ".csv")).write_bytes(data)


def converted(*words):
    """Run tools/table.py photos -> the lines of metadata.csv."""
    assert cli("table", "photos", *words) == 0
    return Path("photos/metadata.csv").read_text("utf-8").splitlines()


# What a case is about (with flags), a table as people save it, and below it the metadata.csv that
# comes of it. The files that this names are there, and those that stand after "beside".
AS_SAVED = """\
titles with capitals, blanks and hyphens: IMAGE Name;Diagnosis;Patient-ID;lesion\u00a0ID|a;mole;P;L
file_name,class,patient_id,lesion_id|a.jpg,mole,P,L
German --name Bild --class befund --group FALL: Bild;Befund;Fall;class|a;Mal;1;x|b;Narbe;1;y
file_name,class,group|a.jpg,Mal,1|b.jpg,Narbe,1
known columns in their order, but not empty ones: \
label,class,diagnosis,dx,diagnosis_1,diagnosis_3,isic_id,image|,,,,5,,a,b|1,2,3,4,6,NA,b,a|,,,,,7,9,
file_name,class|a.jpg,5|b.jpg,6
capitals, endings, \\, folders of the disk: image|IMG_1.jpg|IMG_2|rare\\1.JPG|3.jpg
file_name|IMG_1.JPG|img_2.jpg|rare/1.jpg|x/3.jpg
folders of the table, absolute paths: \
image|old/x/1.jpg|C:\\me\\2.jpg|/home/me/3.jpg|\\\\me\\4.jpg|~/me/5.jpg|../z/6.jpg
file_name|x/1.jpg|y/2.jpg|3.jpg|4.jpg|y/5.jpg|z/6.jpg
an exact name rules out all others: image|1.jpg|x/1.jpg|X/1.jpg
file_name|1.jpg|x/1.jpg|X/1.jpg
a folder that differs, one column of 1, beside P/x/1.jpg: image,ok|Q/x/1.jpg,1|P/x/2.jpg,1
file_name|P/x/2.jpg
files that were converted, if no row has the new name, beside 3.jpg: \
image|1.HEIC|2.tif|2.b.jpg|2.jpg|3.2
file_name|1.jpg|2.b.png|2.jpg
both forms of é: image,class,patient_id|\u00e9 1,\u00e9,\u00e9|e\u0301 2,e\u0301,e\u0301
file_name,class,patient_id|e\u0301 1.jpg,\u00e9,\u00e9|\u00e9 2.jpg,\u00e9,\u00e9
blanks, also a Mac's, and quotes:  image , class |a\u202fb , mole\u00a0|  c,  "scar; ""old"", 5"
file_name,class|a\u202fb.jpg,mole|c.jpg,"scar; ""old"", 5"
blank rows and titles, as Excel leaves them: sep=;|image;class;;|a;mole;;|;;;|b;scar|;;;
file_name,class|a.jpg,mole|b.jpg,scar
tabs, and a first column without a title: \timage\tdx\tPatient|0\ta\tmole\tP|1\tb\tscar\tQ
file_name,class,patient_id|a.jpg,mole,P|b.jpg,scar,Q
words that mean none --group Patient-ID: \
image,class,patient_id|a,NULL,-|b,mole,?|c,unknown,missing|d,None,0|e,N/A,#N/A
file_name,class,patient_id|a.jpg,,|b.jpg,mole,|c.jpg,,|d.jpg,,0|e.jpg,,
a lesion's patient, of any row: image,lesion_id,patient_id|a,L,|b,L,P|c,M,|d,N,|e,,Q|9,N,R
file_name,patient_id,lesion_id|a.jpg,P,L|b.jpg,P,L|c.jpg,,M|d.jpg,R,N|e.jpg,Q,
a column of 0 and 1 for each class: image;age;MEL;NV|a;1;0.0;1,0|b;50;1;0|9;60;;
file_name,class|a.jpg,NV|b.jpg,MEL
columns of 0 and 1 that are no classes: image,a,b|a,1,1|b,0,1
file_name|a.jpg|b.jpg
a study's groups, which are to be compared: image,dx,group|a,mole,treated|b,scar,control
file_name,class|a.jpg,mole|b.jpg,scar
columns of 0 and 1 of which a row has none: image,a,b|a,0,0|b,0,1
file_name|a.jpg|b.jpg
classes before sexes, equal rows: image,male,female,dx|a,1,0,mole|b,0,1,scar|a.jpg,0,1,mole
file_name,class|a.jpg,mole|b.jpg,scar
the program's own format: class,file_name,group|mole,a.jpg,|scar,b.jpg,G
file_name,class,group|a.jpg,mole,|b.jpg,scar,G
HAM10000's table: lesion_id,image_id,dx,dx_type,age,sex|H_8,I_9,bkl,histo,80.0,male
file_name,class,lesion_id|part_1/I_9.jpg,bkl,H_8"""
AS_SAVED = [(*a.split(": ", 1), b) for a, b in zip(*[iter(AS_SAVED.split("\n"))] * 2)]


@pytest.mark.parametrize("about, text, want", AS_SAVED, ids=[case[0] for case in AS_SAVED])
def test_the_table_tool_reads_tables_as_people_save_them(empty_folder, about, text, want):
    """The program accepts what it writes, with these images and no others."""
    names = [row["file_name"] for row in csv.DictReader(want.split("|"))]
    photos(" & ".join([*names, *about.split(" beside ")[1:]]), labels_csv=text)
    assert converted(*"".join(about.partition("--")[1:]).split()) == want.split("|")
    assert [*vqldm.find_images(Path("photos"))] == sorted(names)


ENCODINGS = "utf-8 utf-8-sig utf-16 utf-16-le utf-16-be cp1252".split()


@pytest.mark.parametrize("encoding, end", [*zip(ENCODINGS, 2 * ["\r\n", "\r", "\n"])])
def test_the_table_tool_reads_encodings_and_ends_of_lines(empty_folder, printed, encoding, end):
    photos("a.jpg & b.jpg", x_csv=f"image;class{end}a;Hämangiom{end}b;Nävus".encode(encoding))
    assert converted() == ["file_name,class", "a.jpg,Hämangiom", "b.jpg,Nävus"]
    assert f"read photos/x.csv, in {encoding.removesuffix('-sig')}, with ';'" in printed()


REFUSED_BY_THE_TOOL = {  # a table of a.jpg, b.jpg, x/1.jpg, y/1.jpg, and what the sentence says
    "image|c": "x.csv: names ['c'], but photos has ['a.jpg', 'b.jpg', 'x/1.jpg']",
    "Bild,dx|a,x": "which of ['Bild', 'dx'] has the names? Type --name",
    "": "x.csv: which of [] has the names?",
    "image|b|1|a": "'1' may be any of ['x/1.jpg', 'y/1.jpg']",
    "image,Patient ID,patient_id|a,x,y": "['Patient ID', 'patient_id'] are one title",
    "image,dx|a,Nevus|b,nevus": "'Nevus' and 'nevus' differ by capitals",
    "image,lesion_id,patient_id|a,L,P|b,L,Q": "L: has the patients ['P', 'Q']",
    "image,dx|a,mole|a.jpg,scar|b,mole": "a.jpg: has two rows that differ",
    "image,dx|a,mole, old|b,scar": "more words than titles in ['a', 'mole', 'old']",
    'image,dx|a,"mole': "x.csv: cannot be read",
    "PK\3\4": "x.csv: is a spreadsheet; save it as CSV (in Excel: CSV UTF-8)",
    b"image\n\x81\xff": "is not in UTF-8, UTF-16 or cp1252",
    "image|a --class du": "--class du: is not among the titles",
    "image|a y.csv": "y.csv: is no file, here or in photos",
}


@pytest.mark.parametrize("text", REFUSED_BY_THE_TOOL)
def test_the_table_tool_refuses_what_it_would_have_to_guess(empty_folder, refused, text):
    words = text.split(" ")[1:] if text[:8] == "image|a " else []
    photos("a.jpg & b.jpg & x/1.jpg & y/1.jpg", x_csv=text[:7] if words else text)
    assert REFUSED_BY_THE_TOOL[text] in refused("table", "photos", *words)
    assert len([*Path("photos").iterdir()]) == 5  # nothing is written


CHOICES = [  # tables, the one that is typed, and the one that is read, or why none is
    ("metadata_csv a_csv b.tsv", "", "metadata.csv"),
    ("a_csv b.tsv c.txt d.xlsx x/b_csv", "", "a.csv"),
    ("b.tsv c.txt .a_csv", "", "b.tsv"),
    ("a_csv x/metadata_csv", "x/metadata.csv", "x/metadata.csv"),
    ("a_csv A.CSV", "", "photos: has the tables ['A.CSV', 'a.csv']; name one"),
    ("x.txt", "", "photos: has no .csv or .tsv; name the table after the folder"),
    ("x.xlsx", "", "x.xlsx: is a spreadsheet"),
    ("a_csv b.tsv", "b.tsv", "b.tsv: is here and in photos; type its whole path"),
    ("metadata_csv a_csv", "a.csv", "metadata.csv: is there already"),
    ("metadata_csv metadata.original_csv", "", "metadata.original.csv: is in the way"),
]


@pytest.mark.parametrize("tables, typed, told", CHOICES)
def test_the_table_tool_chooses_a_table(empty_folder, capsys, tables, typed, told):
    photos("x/a.jpg", **dict.fromkeys(tables.split(), "image|a"))
    Path("b.tsv").touch()
    status, (out, error) = cli("table", "photos", *typed.split()), capsys.readouterr()
    assert f"read photos/{told}, in utf-8" in out if status == 0 else told in error
    assert (status == 0) == (" " not in told)


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
def test_the_table_tool_overwrites_nothing_and_does_nothing_twice(empty_folder, printed, name):
    photos("a.jpg & b.jpg", **{name: "image;dx|a;mole|b;scar"})
    want = ["file_name,class", "a.jpg,mole", "b.jpg,scar"]
    assert converted(name) == want and "nothing to be done" not in printed()
    there = {path: path.stat() for path in Path("photos").iterdir()}
    assert converted(name) == want and "nothing to be done" in printed()
    assert {path: path.stat() for path in Path("photos").iterdir()} == there and len(there) == 4
    kept = Path("photos", name.replace("metadata", "metadata.original"))
    assert kept.read_text() == "image;dx\na;mole\nb;scar"
    Path("photos", name).write_text("image;dx\na;scar\nb;scar")
    assert cli("table", "photos", name) == 2


def test_the_table_tool_replaces_a_link_and_does_not_write_through_it(empty_folder):
    photos("a.jpg")
    Path("theirs.csv").write_text("image;dx\na;mole")
    Path("photos/metadata.csv").symlink_to("../theirs.csv")
    assert converted() == ["file_name,class", "a.jpg,mole"]
    assert Path("theirs.csv").read_text() == "image;dx\na;mole"
    assert Path("photos/metadata.original.csv").readlink() == Path("../theirs.csv")


def test_the_table_tool_shows_what_it_took(empty_folder, printed):
    titles = "Image,Diagnosis,class,Patient ID,lesion_id,,Age"
    rows = "w,scar,x,Q,,,7|x,scar,x,Q,,,7|y,scar,x,Q,,,7|z,scar,x,Q,,,7"
    rows = f"1.jpg,mole,x,P,L,,7|2.jpg,mole,x,P,,,7|3.jpg,scar,x,,M,,7|4.jpg,,x,,,,7|{rows}"
    photos(" & ".join(f"{i}.jpg" for i in range(2, 9)) + " & 1.JPG", x_csv=f"{titles}|{rows}")
    converted()
    told = """read photos/x.csv, in utf-8, with ',' between columns
taken: file_name from 'Image', class from 'Diagnosis', patient_id from 'Patient ID', \
lesion_id from 'lesion_id'
not used: ['class', 'Age']
names that are no path below the folder: 1, such as ['1.jpg is 1.JPG']
rows without a file: 4, such as ['w', 'x', 'y']
files without a row, left out: 4, such as ['5.jpg', '6.jpg', '7.jpg']
wrote photos/metadata.csv with 4 images
photos/metadata.csv names 4 of 8 images, and only these are used
classes by class - images split by {'patient_id': 2, 'lesion_id': 1, 'image': 1}
classes: {'mole': 2, 'scar': 1, 'unknown': 1}
groups: 3
"""
    assert printed() == told
    for titles in (table.NAME, table.CLASS):  # the order that --help promises
        assert f" {', '.join(titles[:-1])} or {titles[-1]}" in table.__doc__


# ---- tools/letters.py and tools/classifier.py ----------------------------------------------------
def test_letters_draws_a_folder_for_each_class(empty_folder):
    letters.draw_letters("letters", 2)
    classes = sorted(c for c, *_ in vqldm.find_images(Path("letters")).values())
    assert classes == sorted(2 * "ABEFGKPR")
    letters.draw_letters("again", 2)
    one, two = [sorted(Path(folder).rglob("*.png")) for folder in ("letters", "again")]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_the_classifier_gives_all_classes_equal_weight():
    """Two classes overlap, and one is ten times as frequent. Each is found equally often."""
    label = (torch.arange(1100) >= 1000).long()
    x = randn(1100, 1) + 2 * label[:, None]
    found = classifier.found(classifier.fit(x, label, 2), x, label, ["often", "rare"])
    assert found["often"] == pytest.approx(found["rare"], abs=6)


def test_the_classifier_compares_samples_with_duplicates(copy_of, tmp_path, monkeypatch, printed):
    """Stage 2 has photos of its own here. Patient P was trained on, and so is no test, in two of
    them. Classes have equal weight in what is printed."""
    own = shutil.copytree("photos", tmp_path / "own")
    rows = [f"{p.relative_to(own)},{'P' * (p.stem == '0')}" for p in own.rglob("*.bmp")]
    (own / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    copy_of("ldm", dict(data=str(own)))
    monkeypatch.setattr(vqldm, "load_lpips", lambda device: "LPIPS")
    monkeypatch.setattr(evaluate, "features", lambda net, x: F.avg_pool2d(x.double(), 8).flatten(1))
    fits, tests = [recorded(monkeypatch, classifier, name) for name in ("fit", "found")]
    assert cli("classifier", tmp_path / "ldm", 4, "scar") == 0
    trained_on = {*bytes_of(fits[0].x)}
    assert len(trained_on) == 31 and {len(call.x) for call in tests} == {4, 17}
    assert all({*bytes_of(call.x)} == trained_on for call in fits[2::2])  # with duplicates
    assert len({*bytes_of([call.x[31:] for call in fits[1::2]])}) == 3  # other samples each time
    told, shares = printed(), [*tests[0].result.values()]
    assert f"photographs alone balanced accuracy {sum(shares) / 2:.1f}" in told
    assert told.count("with samples balanced accuracy") == 3
    assert told.count("with as many duplicates balanced accuracy") == 3
