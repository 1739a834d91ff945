# SPDX-License-Identifier: MIT
"""What vqldm.py promises, as tests, in its order. A test's name is the promise, and its docstring
says why, or how chance is excluded. The strongest are the references: they write both trainings and
the samplers out once more, plainly, and the program must end with the same numbers. Two rules: what
a Mock or plainly switches off gets one test that it is called, and with what. What has a cap gets a
case on each side of it. No network, GPU or data is needed."""

import copy, functools, hashlib, inspect, io, itertools, json, math, os, re, runpy, shlex
import shutil, signal, sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from threading import Barrier, Event, local
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock, Mock

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


# ---- Helpers -----------------------------------------------------------------------------------
def randn(*shape, key=0):
    """Normal numbers that are the same in each run, whatever ran before."""
    return torch.randn(shape, generator=rng("test", key))


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


def recorded(patch, owner, name, before=lambda call: None):
    """-> a list of the calls of owner.name: arguments by name, and result. First, before(call)."""
    function, calls = getattr(owner, name), []

    def call_and_record(*a, **how):
        bound = inspect.signature(function).bind(*a, **how)
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
    """Each test runs plainly, one with calm in its folder, and one with runs in their precision."""
    bf16 = "runs" in request.fixturenames and request.getfixturevalue("runs").bf16
    plainly(monkeypatch, bf16)
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


def picture(mode="RGB", left="red", right="blue", size=(40, 40)):
    """A PIL image whose halves have these colours."""
    im = Image.new(mode, size, left)
    im.paste(right, (size[0] // 2, 0, *size))
    return im


def fill(folder, names="", colour=(0, 0, 99), size=(40, 40)):
    """Save images in two halves -> folder. The left half's red counts up from colour's, and 37 are
    all different. If a name ends in bmp, its bytes are the same in any version of PIL."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names.split() if isinstance(names, str) else names):
        left = tuple(c + i * k % 37 for c, k in zip(colour, (1, 5, 11)))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(left=left, right=colour, size=size).save(folder / name)
    return folder


def classes_of(images):
    """The name of each image's class."""
    return [images.classes[c] for c in images.labels]


@pytest.fixture()
def load(tmp_path):
    """A function that reads a folder (or "synthetic"), with settings of VQConfig -> Images."""

    def call(data, size=16, unconditional=False, **how):
        cfg = vqldm.VQConfig(data=str(data), size=size, **how)
        return vqldm.read_images(cfg, tmp_path / "cache", unconditional)

    return call


@pytest.fixture()
def read(tmp_path, load):
    """A function that saves a PIL image under a name, and reads it -> (3,16,16), as integers."""

    def call(im, name, **how):
        im.save(fill(tmp_path / name) / name, **how)
        return load(tmp_path / name).pixels[0].int()

    return call


STAGES = {  # 12 steps each
    "vq": "train-vq --lpips-weight 0 --size 32 --widths 8,8 --codes 16 --epochs 3 "
    "--data photos --gan-start .4".split(),
    "ldm": "train-ldm --vq calm/vq --T 3 --steps 3 --widths 8 --batch-size 8 --epochs 3".split(),
}


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """A folder with photos of the classes mole and scar (24 and 12 in train, 8 and 4 in val), and
    with both stages, trained undisturbed in calm/vq and calm/ldm. drawn: the calls of draw_rows."""
    folder = tmp_path_factory.mktemp("calm")
    for part, n, colour in (("train", 36, (203, 119, 90)), ("val", 12, (90, 120, 200))):
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
    its checkpoint become those that are named, and config is merged."""

    def call(stage, config=None, **parts):
        folder = shutil.copytree(calm.folder / "calm" / stage, tmp_path / stage)
        state = {**state_of(folder / "last.pt"), **parts}
        state["config"].update(config or {})
        torch.save(state, folder / "last.pt")
        return folder

    return call


def beside(patch, *others):
    """As if a second process gave these tensors, one in each all_reduce."""
    others = iter(others)

    def add(x):
        other = torch.as_tensor(next(others))
        assert x.shape == other.shape, "another tensor is averaged"
        x.add_(other)

    patch.setattr(vqldm, "TORCHRUN", True)
    patch.setattr(vqldm, "WORLD", 2)
    patch.setattr(vqldm.dist, "all_reduce", add)


# ---- 1. Blocks ---------------------------------------------------------------------------------
def test_blocks_add_nothing_at_first():
    """A ResBlock is its shortcut, an AttentionBlock the identity, and the UNet answers 0."""
    x, emb = randn(2, 8, 4, 4), randn(2, 16)
    alike, wider = vqldm.ResBlock(8, 8, 16), vqldm.ResBlock(8, 12)
    assert torch.equal(alike(x, emb), x)
    assert torch.equal(wider(x), wider.shortcut(x))
    assert torch.equal(vqldm.AttentionBlock(8)(x), x)
    assert not alike.emb(emb).any()  # emb neither scales nor shifts
    assert not vqldm.UNet(8, (8, 12), 1)(x, torch.tensor([0, 5])).any()


def test_bf16_is_used_where_it_is_fast(monkeypatch):
    """On a CPU or a GPU of NVIDIA. (One that lacks it would emulate it.)"""

    def gpu(including_emulation=True):
        return there or including_emulation

    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (dtype, enabled))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", gpu)
    for there in (False, True):
        plainly(monkeypatch, bf16=there)
        for kind, fast in (("cpu", there), ("cuda", there), ("mps", False)):
            x = Mock(device=Mock(type=kind))
            assert vqldm.mixed_precision(x) == (torch.bfloat16, fast)


def res(block, x, emb):
    """emb scales and shifts what the second norm puts out: AdaGN (Dhariwal & Nichol 2021)."""
    y = block.norm2(block.conv1(F.silu(block.norm1(x))))
    if emb is not None:
        scale, shift = block.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)
        y = y + scale * y + shift
    return block.shortcut(x) + block.conv2(F.silu(y))


def attention(block, x):
    """By torch's own module, with the weights of the block."""
    own = nn.MultiheadAttention(x.shape[1], 1, batch_first=True)
    weights = block.qkv.weight, block.qkv.bias, block.out.weight, block.out.bias
    own.load_state_dict(dict(zip(own.state_dict(), weights, strict=True)))
    y = block.norm(x).flatten(2).transpose(1, 2)  # (B,N,C)
    return x + own(y, y, y)[0].transpose(1, 2).view_as(x)


@pytest.mark.parametrize("side", [1, 5])
def test_attention_is_that_of_torchs_own_module(side):
    """On grids that are not square, too."""
    block, x = rough(vqldm.AttentionBlock(8)), randn(2, 8, 3, side)
    assert (block(x) - x).abs().max() > 0.1
    assert torch.allclose(block(x), attention(block, x), atol=1e-5)


def written_out(net, y, emb=None):
    """Down, middle, up, last, as VQGAN's Table 7 has them, from a network's layers. With emb:
    what each DownBlock has before it halves stands beside what the UpBlock of that size doubled."""
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


# ---- 2. Stage 1: the VQGAN ---------------------------------------------------------------------
@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
def test_encoder_and_decoder_are_the_blocks_of_the_paper(upsample):
    net = rough(vqldm.VQGAN(vqldm.VQConfig(widths=(8, 12), codes=5, upsample=upsample)))
    x, z = randn(2, 3, 16, 16), randn(2, 3, 4, 4)
    for part, y, out in ((net.encoder, x, z), (net.decoder, z, x)):
        assert torch.allclose(part(y), written_out(part, y), atol=1e-3)
        assert part(y).shape == out.shape
    assert ("ConvTranspose2d" in repr(net.decoder)) == (upsample == "transposed")


def test_default_networks_have_as_many_weights_as_ever():
    """What is written out takes kernel sizes as given. After a change, count anew."""
    vqgan, unet = vqldm.VQGAN(vqldm.VQConfig()), vqldm.UNet(3, (64, 128), 4)
    assert sum(p.numel() for p in vqgan.parameters()) == 568_246
    assert sum(p.numel() for p in unet.parameters()) == 2_725_763


def test_nearest_code_is_that_of_a_float64_search():
    """And a code looked up lies channels first, as a Mac's GPU needs it, and is its own nearest."""
    book, z = rough(vqldm.Codebook(512, 4), 1), randn(4, 4, 16, 16, key=2)
    e, k = book.embedding.weight.detach(), book.nearest(z)
    vectors = z.double().movedim(1, -1).flatten(0, 2)  # (B·h·w,d)
    distance = (vectors[:, None] - e.double()).square().sum(2)
    excess = distance.gather(1, k.flatten()[:, None])[:, 0] - distance.amin(1)
    assert excess.max() < 1e-5 and k.shape == (4, 16, 16)
    z_q = book.lookup(k)
    assert z_q.is_contiguous() and torch.equal(z_q.movedim(1, -1), e[k])
    assert torch.equal(book.nearest(z_q), k)


def test_only_codes_without_a_win_restart_beside_encoder_outputs():
    """Anywhere among them, and no two alike: nearer than a tenth of the spread, as measured in each
    channel by its own, which is 1 in the first, 10 in the next, and so on."""
    book, dead = rough(vqldm.Codebook(64, 4), 1), torch.arange(64) % 3 == 0
    before, e = book.embedding.weight.detach().clone(), book.embedding.weight.data
    book.wins[~dead] = torch.arange(1.0, 43)
    z = (100 + randn(2, 4, 6, 6)) * torch.tensor([1, 10, 100, 1000]).view(-1, 1, 1)
    book.restart_unused(z, rng(0))
    assert torch.equal(e[~dead], before[~dead])
    assert not book.wins.any()  # all count from zero again
    outputs, again = z.movedim(1, -1).flatten(0, 2).double(), e[dead].double()
    far, chosen = torch.cdist(again / outputs.std(0), outputs / outputs.std(0)).min(1)
    assert far.max() < 0.1
    assert chosen.min() < 10 and chosen.max() > 61  # of 0…71
    assert len(again.unique(dim=0)) == len(again)
    book.restart_unused(randn(1, 4, 1, 1), rng(0))  # a single vector has no spread
    assert book.embedding.weight.isfinite().all()


# ---- 3. Stage 1: the losses --------------------------------------------------------------------
def test_discriminator_gives_a_logit_for_each_patch():
    """Convolutions that halve, Norm over the whole image (not at first), LeakyReLU, no sigmoid."""
    for widths, channels in (((80, 8), [3, 40, 80, 1]), ((8, 8, 8), [3, 32, 64, 128, 1])):
        disc, x, f = rough(vqldm.PatchDiscriminator(widths)), randn(2, 3, 96, 96), 2 ** len(widths)
        weights, y = iter(disc.parameters()), x
        for c_in, c in itertools.pairwise(channels):
            weight, bias = next(weights), next(weights)
            last = c == 1
            assert weight.shape == ((1, c_in, 3, 3) if last else (c, c_in, 4, 4))
            y = F.conv2d(y, weight, bias, stride=1 if last else 2, padding=1)
            if c_in > 3 and not last:
                y = F.group_norm(y, 1, next(weights), next(weights))
            y = y if last else F.leaky_relu(y, 0.2)
        assert not list(weights)  # none is left
        assert torch.allclose(disc(x), y, atol=1e-3 * float(y.detach().abs().max()))
        assert y.shape == (2, 1, 96 // f, 96 // f) and y.abs().max() > 1


def test_lam_divides_the_lengths_of_gradients_averaged_over_processes(monkeypatch):
    """Not the means of lengths. Of rec mine is (3, 0), the other's (0, 4), so the mean has length
    2.5. Of the GAN mine is (0, 1), the other's (0, 2). wanted and lam are constants."""
    last = torch.zeros(2, requires_grad=True)
    beside(monkeypatch, [0, 4.0], [0, 2.0])
    wanted, lam = vqldm.adaptive_weight(3 * last[0], last[1], last, 0.25)
    assert float(wanted) == pytest.approx(2.5 / (1.5 + 1e-4)) and lam == 0.25
    assert not wanted.requires_grad and not lam.requires_grad


def test_lpips_is_frozen_and_can_be_left_out(lpips, monkeypatch, said):
    """Where it cannot be loaded, it is left out, with a warning."""
    assert "Dropout" in repr(lpips) and not any(m.training for m in lpips.modules())
    assert not any(p.requires_grad for p in lpips.parameters())
    x, x_hat = randn(2, 2, 3, 64, 64).requires_grad_()
    assert not lpips(x, x).any()
    assert torch.autograd.grad(lpips(x_hat, x).sum(), x_hat)[0].any()
    monkeypatch.setattr("lpips.LPIPS", Mock(side_effect=OSError("no internet")))
    assert ORIGINAL.load_lpips(torch.device("cpu")) is None
    assert re.search("WARNING LPIPS.*/checkpoints.*no internet", said())


# ---- 4. Settings -------------------------------------------------------------------------------
def test_a_folder_is_recorded_with_its_full_path(elsewhere, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(elsewhere))
    assert vqldm.source("new") == vqldm.source("~/new") == os.path.realpath("new")
    assert vqldm.source("synthetic") == "synthetic"
    assert vqldm.VQConfig(out="~/x").folder == elsewhere / "x"
    assert vqldm.VQConfig(out="~no-such-user/x").folder == Path("~no-such-user/x")


# ---- 5. Device and chance ----------------------------------------------------------------------
def test_device_auto_takes_the_gpu_if_there_is_one(monkeypatch, said):
    """meta stands in for a GPU that is not fast at bf16, as opposed to this processor. One that is
    not there, though torch was built for it, would be told unless it is asked."""

    def find(check_available=False):
        return there if check_available else "cuda:77"

    fast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(vqldm, "mixed_precision", lambda x: fast)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", find)
    for there, dtype in (("meta", "float32"), (None, "bfloat16")):
        assert vqldm.pick_device("auto").type == (taken := there or "cpu")
        assert said() == f"device {taken} which multiplies in torch.{dtype}\n"


def test_random_numbers_follow_from_their_key_in_any_process():
    """Python's own hash would give others in each. If this number changes, so do all runs."""
    assert rng(0, "a").initial_seed() == 3057973756231466050


# ---- 6. What both trainings share --------------------------------------------------------------
def of_ids(content, group, test=False):
    """Images with these checksums, of the classes a and b in turn."""
    i = torch.arange(len(content))
    ids = torch.stack([torch.as_tensor(content), torch.as_tensor(group)], 1)
    return vqldm.Images(i, i % 2, ["a", "b"], ids, torch.as_tensor(test).bool().expand(len(i)))


def test_seen_are_a_content_a_group_and_all_images_of_that_group():
    images = of_ids([1, 2, 3, 4, 5, 1, 6], [10, 10, 30, 30, 50, 60, 60])
    known = images.known(torch.tensor([1, 30, 99]))
    assert known.tolist() == [True, True, True, True, False, True, True]


def test_a_share_of_groups_is_held_out_whole():
    """By the last four digits of their number, so that a larger share contains the smaller. Of the
    folders val and test all is held out, and of all the rest, at 0, nothing."""
    group = 3 * torch.arange(20_000).repeat(2)  # all digits are there
    images = of_ids(torch.arange(40_000) + 100_000, group, group == 3 * 9999)
    for share in (0, 0.0001, 0.1, 0.25, 0.5):
        train, val, seen = vqldm.split(images, share)
        held = (group % 10_000 < 10_000 * share) | images.test
        assert torch.equal(val.sort().values, held.nonzero()[:, 0]), share
        assert torch.equal(train, (~held).nonzero()[:, 0])
        assert torch.equal(seen, images.ids[train].unique())
        assert share == 0 or not torch.equal(val, val.sort().values)  # they are mixed


def test_nothing_that_was_ever_trained_on_is_held_out():
    """Neither in a folder test, nor as a copy, nor by its group. And it is never forgotten."""
    seen = torch.tensor([1, 1001, 3000, 77])
    again = of_ids([2, 3, 1, 4, 5, 6], [1001, 3000, 4, 4, 5, 6000], [1, 1, 1, 1, 1, 0])
    train, val, seen_after = vqldm.split(again, 0.1, seen)
    assert train.tolist() == [5] and val.tolist() == [4]
    assert seen_after.tolist() == [1, 6, 77, 1001, 3000, 6000]


def test_what_either_stage_saw_is_never_measured_and_never_forgotten(calm, tmp_path, monkeypatch):
    """Stage 2 and evaluate hold out what stage 1 held out. A resume remembers all it saw, and
    the scale that its network knows, though files are lost, or renamed in a folder val."""
    photos, vq, ldm = shutil.copytree("photos", tmp_path / "all"), tmp_path / "vq", tmp_path / "ldm"
    splits, unseen = [recorded(monkeypatch, vqldm, name) for name in ("split", "unseen_images")]
    first = train("vq", vq, "--held-out", 0.4, "--data", photos, "--epochs", 1)
    second = train("ldm", ldm, "--vq", vq, "--epochs", 1)
    assert cli("evaluate", "--ckpt", ldm, "--n", 2) == 0
    (rows, val, seen), (again, _, _) = [call.result for call in splits]
    assert torch.equal(rows, again) and 12 < len(rows) < 30  # of 36
    assert sorted(unseen[0].result[0].tolist()) == sorted(val.tolist())
    for i, path in enumerate(sorted(photos.glob("train/*/2?.bmp"))):
        path.rename((photos / "val/mole" if i % 2 else tmp_path) / f"again{i}.bmp")
    for stage, state, place in (("vq", first, vq), ("ldm", second, ldm)):
        assert cli(f"train-{stage}", "--resume", "--epochs", 3, "--out", place) == 0
        grown = state_of(place / "last.pt")
        assert grown["step"] > state["step"] and torch.equal(grown["seen"], seen)
        held = splits[-1].images.ids[splits[-1].result[1]]
        assert len(held) and not torch.isin(held, seen).any()
    assert torch.equal(grown["scale"], second["scale"])


def test_what_is_held_out_is_told_by_class(tmp_path, load, said):
    names = [f"{c}/{i}.bmp" for c in "ab" for i in range(9)]
    images = load(fill(tmp_path / "x", [*names, "val/b/x.bmp"]))
    said(), vqldm.split(images, 0)
    assert said() == "to train on: 18 images: {'a': 9, 'b': 9}\nheld out: 1 images: {'b': 1}\n"


def test_batches_are_an_endless_stream_of_shuffled_epochs():
    """Also if a batch is longer than an epoch."""
    for n, B in ((10, 4), (3, 10)):
        stream = torch.cat([vqldm.next_rows(n, step, B, 0) for step in range(2 * n)])
        epochs = stream.view(2 * B, n)
        assert torch.equal(epochs.sort().values, torch.arange(n).expand(2 * B, n))
        assert len(epochs.unique(dim=0)) > 3  # they differ
    assert not torch.equal(vqldm.next_rows(10, 0, 10, 0), vqldm.next_rows(10, 0, 10, 1))


def symmetries(x):
    """The eight of x (3,H,H), by NumPy."""
    return [np.rot90(y, k, (1, 2)) for y in (x, np.flip(x, 2)) for k in range(4)]


def test_augment_shows_an_image_in_the_squares_eight_symmetries():
    x, turns = randn(8, 3, 5, 5), torch.arange(8)
    for image, shown in zip(x.numpy(), vqldm.augment(x, turns).numpy()):
        assert sum(np.array_equal(shown, a) for a in symmetries(image)) == 1
    every = vqldm.augment(x[:1].expand(8, -1, -1, -1), turns)
    assert len(every.unique(dim=0)) == 8
    assert torch.equal(every[0], x[0]) and torch.equal(every[4], x[0].flip(2))


def test_rates_rise_for_50_steps_and_fall_to_a_hundredth():
    points = (0, 0, 0.02), (24, 0.1, 0.5), (49, 0.3, 1), (99, 0.4, 1), (99, 0.7, 0.5), (99, 1, 0.01)
    for step, progress, factor in points:
        assert vqldm.lr_factor(step, progress) == pytest.approx(factor)


def test_a_step_follows_the_mean_gradient_clipped_and_finite(monkeypatch, said):
    """The mean over processes: mine is (.2, .4), the other's (.4, .4). A step is the factor times
    the first rate, however often that was lowered, and a gradient of length 50 becomes one of 1."""
    net, x = nn.Linear(2, 1, bias=False), torch.tensor([0.2, 0.4])
    optimizers = [torch.optim.SGD(net.parameters(), lr) for lr in (0.75, 0.25)]
    want = net.weight.detach().clone()
    for scale, other, factor, step in (
        (1, [0.4, 0.4], 0.5, [0.15, 0.2]),
        (1, [0.4, 0.4], 0.1, [0.03, 0.04]),
        (math.inf, [0.4, 0.4], 0.5, [0, 0]),
        (math.nan, [0.4, 0.4], 0.5, [0, 0]),
        (1, [math.nan, 0.4], 0.5, [0, 0]),
        (1, [0.4, 0.4], 1.0, [0.3, 0.4]),
        (1, [59.8, 79.6], 1.0, [0.6, 0.8]),
    ):
        beside(monkeypatch, [other])
        vqldm.descend(scale * net(x).sum(), net, factor, *optimizers)
        want -= torch.tensor(step)
        assert torch.allclose(net.weight, want, atol=1e-4), (scale, other, factor)
        assert ("is skipped" in said()) == (not any(step))


# ---- 7. Stage 1: training ----------------------------------------------------------------------
# The references of sections 7, 10 and 11 share the program's modules and the keys of its random
# numbers, and nothing of its loops.
def drawn(cfg):
    """-> all images in [-1,1], rows to train on, held-out rows."""

    def content(i):
        name = f"{cfg.seed} {list(vqldm.LESIONS)[i % 4]}/{i}"
        return vqldm.digest(hashlib.sha256(name.encode()).digest())

    images = torch.stack([vqldm.synthetic(i, cfg.size, cfg.seed) for i in range(cfg.n_images)])
    held = torch.tensor([content(i) % 10_000 < 1000 for i in range(cfg.n_images)])
    val = held.nonzero()[:, 0]
    val = val[torch.randperm(len(val), generator=rng("held out"))]
    return images.float() / 127.5 - 1, (~held).nonzero()[:, 0], val


def steps_of(cfg, train):
    """-> step, its rows, how far the run is, factor of all learning rates."""
    orders = [torch.randperm(len(train), generator=rng(cfg.seed, "order", i)) for i in range(11)]
    rows = train[torch.cat(orders)].split(cfg.batch_size)
    n = math.ceil(len(train) * cfg.epochs / cfg.batch_size)
    for i in range(n):
        progress = i / n
        yield i, rows[i], progress, max(0.01, min(1, (i + 1) / 50, (1 - progress) / 0.6))


def adam(params, betas=(0.9, 0.99)):
    return torch.optim.Adam(params, 0.0, betas, fused=True)


def step_along(net, loss, rates, factor):
    """One step of each optimiser in rates, {optimiser: learning rate}."""
    params = list(net.parameters())
    for p, g in zip(params, torch.autograd.grad(loss, params)):
        p.grad = torch.empty_like(p).copy_(g)  # fused Adam takes it as it lies
    nn.utils.clip_grad_norm_(params, 1.0)
    for optimizer, lr in rates.items():
        optimizer.param_groups[0]["lr"] = factor * lr
        optimizer.step()


def rates_of_vqgan(net, cfg):
    """Muon moves the kernels inside, if it has a rate, and Adam the rest. Codes have their own."""
    codes, kernels, rest = [], [], []
    for name, p in net.named_parameters():
        if "embedding" in name:
            codes.append(p)
        elif cfg.muon_lr and p.dim() == 4 and not re.search("first|last", name):
            kernels.append(p)
        else:
            rest.append(p)
    muon = vqldm.Muon(kernels, 0.0)
    return {adam(rest): cfg.lr, adam(codes): cfg.codes_lr, muon: cfg.muon_lr}


def blurred(x_hat, x):
    """Stands in for LPIPS, which wants float32."""
    assert not torch.is_autocast_enabled("cpu")
    return F.avg_pool2d(x_hat.float() - x, 4).square().mean((1, 2, 3))


def plain_vq(cfg):
    """Stage 1 -> VQGAN, D, how many codes started again last, what the log should tell."""
    images, train, val = drawn(cfg)
    torch.manual_seed(cfg.seed)
    net, disc = vqldm.VQGAN(cfg), vqldm.PatchDiscriminator(cfg.widths)
    for part in (net, disc):
        part.to(memory_format=torch.channels_last)  # so that roundings agree
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
        mse, lpips = F.mse_loss(x_hat, x), blurred(x_hat, x).mean()
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
    log.update(val_lpips=blurred(x_hat, x).mean(), codes=(p > 0).sum() / cfg.codes)
    log.update(entropy=-torch.special.xlogy(p, p).sum())
    return net, disc, restarts, {name: float(value.detach()) for name, value in log.items()}


@pytest.fixture(scope="module", params=["float32", "report"])
def runs(request, tmp_path_factory):
    """Both stages, trained by the program. float32: with Muon, v and balance. D joins late, lest
    rounding decides near ties of codes. report: the report's system, in bf16."""
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    vq_cfg = vqldm.VQConfig(
        **dict(size=32, n_images=46, widths=(4, 8), codes=512, batch_size=4, epochs=6),
        **dict(lpips_weight=0.5, gan_start=0.75, gan_weight=0.4, seed=6),
        **dict(lr=5e-4, muon_lr=0.005, codes_lr=0.005, d_lr=2e-3, out=str(folder / "vq")),
    )
    cfg = vqldm.LDMConfig(
        **dict(T=40, widths=(8, 12), ema=0.6, lr=1e-2, batch_size=2, steps=9, epochs=2, seed=5),
        **dict(vq=vq_cfg.out, out=str(folder / "ldm"), balance=True),
    )
    if kind == "report":
        preset = vqldm.PRESETS["report"]
        vq_cfg = vqldm.replace(vq_cfg, **{**preset["vq"], "epochs": 1.1})
        cfg = vqldm.replace(cfg, **{**preset["ldm"], "epochs": 1, "steps": 40, "balance": False})
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch, bf16=kind == "report")
        patch.setattr(vqldm, "load_lpips", lambda device: blurred)
        losses = recorded(patch, Diffusion, "loss")
        vqldm.train_vq(vq_cfg, torch.device("cpu"))
        vqldm.train_ldm(cfg, torch.device("cpu"))
    vq = vqldm.load_checkpoint(vq_cfg.out, "", "vq")
    ldm = vqldm.load_checkpoint(cfg.out, "", "ldm")
    model = vqldm.restore_ldm(ldm, torch.device("cpu"))
    held = losses[-1].result  # the last validation's, of each held-out image
    return SimpleNamespace(**locals(), bf16=kind == "report")


def assert_same(state, net):
    for name, p in net.named_parameters():
        off = (state[name] - p).abs() / (1e-4 + 1e-3 * p.abs())
        assert off.max() <= 1, (name, float(off.max()))


def test_reference_stage_1_ends_with_the_papers_weights_and_log(runs):
    """With one rate, row, turn, loss, weight or restart wrong, weights differ."""
    net, disc, restarts, log = plain_vq(runs.vq_cfg)
    assert "codebook.wins" in runs.vq["model"], "a resume would restart all codes"
    wins, want = runs.vq["model"]["codebook.wins"], net.codebook.wins
    other = float((wins - want).abs().sum() / 2 / want.sum())
    assert other < 0.01, "near ties of codes, which rounding decides? Then try another seed"
    assert_same(runs.vq["model"], net)
    assert_same(runs.vq["disc"], disc)
    assert all(p.grad.any() for p in net.parameters())  # so each weight is compared in full
    assert 0 < restarts < 512 if runs.kind == "float32" else restarts == 512
    rows = runs.vq["log"]
    logged = {**[row for row in rows if "mse" in row][-1], **rows[-1]}
    assert logged["val_codes_used_percent"] == pytest.approx(100 * log.pop("codes"), rel=0.02)
    assert logged["val_perplexity"] == pytest.approx(math.exp(log.pop("entropy")), rel=0.02)
    assert {name: logged[name] for name in log} == pytest.approx(log, rel=1e-3)


def test_bad_batches_are_skipped(calm, tmp_path, monkeypatch, said):
    """No weight is spoiled, and the step is counted. D takes part in the last seven steps."""
    bad, begun = {2, 4, 6, 7, 8, 9, 10}, recorded(monkeypatch, vqldm, "next_rows")

    def spoiled(x, turns):
        return ORIGINAL.augment(x, turns) * (math.nan if begun[-1].step in bad else 1)

    monkeypatch.setattr(vqldm, "augment", spoiled)
    state = train("vq", tmp_path)
    assert said().count("is skipped") == 7 + 5 and state["step"] == 12
    assert all(p.isfinite().all() for p in state["model"].values())


def test_images_are_turned_as_allowed(calm, tmp_path, monkeypatch):
    shown = recorded(monkeypatch, vqldm, "augment")
    for turns, want in (("mirror", {0, 4}), ("none", {0})):
        shown.clear()
        train("vq", tmp_path / turns, "--turns", turns, "--epochs", 1)
        assert {int(turn) for call in shown for turn in call.turns} == want


def test_validations_of_stage_1_use_the_same_held_out_images(calm):
    """Under their step, with less error at the end. They are 18, which are several parts."""
    validations = [row for row in state_of("calm/vq/last.pt")["log"] if "val_mse" in row]
    drawn = [call for call in calm.drawn if "recon" in call.path.name]
    names = [f"calm/vq/recon_step_{row['step']:06}.png" for row in validations]
    assert [call.path.as_posix() for call in drawn] == names and len(names) == 10
    assert validations[-1]["val_mse"] < validations[0]["val_mse"]
    originals, made = [{*bytes_of(x)} for x in zip(*[call.rows.values() for call in drawn])]
    assert len(originals) == 1 and len(made) > 5
    x, x_hat = map(vqldm.to_float, drawn[-1].rows.values())
    assert len(x) == 18 and F.mse_loss(x_hat, x) == pytest.approx(validations[-1]["val_mse"], 0.01)


def test_a_validation_uses_256_images_at_most(calm, tmp_path, monkeypatch):
    def many(*a):
        train, val, seen = ORIGINAL.split(*a)
        return train, val.repeat(40), seen

    monkeypatch.setattr(vqldm, "split", many)
    validations = (
        recorded(monkeypatch, vqldm, "reconstruct"),
        recorded(monkeypatch, Diffusion, "loss"),
    )
    for stage in STAGES:
        train(stage, tmp_path / stage, "--epochs", 0.01)
    assert len(validations[0][-1].pixels) == len(validations[1][-1].z0) == 256


# ---- 8. Stage 2: diffusion ---------------------------------------------------------------------
def test_alpha_bar_is_the_product_and_ends_near_0():
    """For every T, with one rounding, from float64, as its only error. Level -1 has no noise."""
    for T in (50, 250, 1000):
        linear = np.linspace(1e-4, 0.02, T) * 1000 / T
        root = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2)
        for schedule, beta in (("linear", linear), ("cosine", 1 - (root[1:] / root[:-1]) ** 2)):
            alpha_bar = Diffusion(T, schedule).alpha_bar
            want = [*np.cumprod(1 - beta.clip(max=0.999)), 1]
            np.testing.assert_allclose(alpha_bar.double(), want, rtol=1.2e-7)
            assert alpha_bar[-2] < 0.01 and (alpha_bar[:-1].diff() < 0).all()


def test_pairs_are_exactly_S_steps_for_every_S():
    for S in range(1, 1001):
        t, prev = zip(*Diffusion().pairs(S))
        assert len(t) == S and t[0] == 999 and prev == (*t[1:], -1)
        assert {a - b for a, b in zip(t, prev)} <= {1000 // S, 1000 // S + 1}  # even strides


# ---- 9. Stage 2: the UNet ----------------------------------------------------------------------
@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
def test_unet_has_skips_and_hears_time_and_class(upsample):
    """emb is time, in sines of periods 2π to 2π·10,000 through two layers, plus the class. Who is
    not told the class hears one more than there are."""
    net, z = rough(vqldm.UNet(3, (8, 12), 3, upsample)), randn(4, 3, 8, 8)
    label, t = torch.arange(4), torch.tensor([5, 50, 500, 999])
    angle = t.double()[:, None] / 10_000 ** (torch.arange(16).double() / 16)
    sines = torch.cat([angle.sin(), angle.cos()], 1).float()
    emb = net.time[2](F.silu(net.time[0](sines))) + net.label.weight
    y = written_out(net, z, emb)
    assert torch.allclose(net(z, t, label), y, atol=1e-3)
    assert y.shape == z.shape
    assert ("ConvTranspose2d" in repr(net)) == (upsample == "transposed")
    untold = net(z, t)
    assert torch.equal(untold, net(z, t, torch.full((4,), 3)))  # classes are 0, 1, 2
    assert (untold - net(z, t, label)).abs().amax((1, 2, 3))[:3].min() > 1e-3


def test_networks_compute_in_bf16_but_for_what_is_measured(monkeypatch):
    """All answer in float32. The decoder's last layer stays in it, for lam."""
    x, z, t = randn(2, 3, 16, 16), randn(2, 4, 4, 4), torch.tensor([1, 2])
    for bf16 in (False, True):
        plainly(monkeypatch, bf16)
        inner = torch.bfloat16 if bf16 else torch.float32
        for net, last, *given in (
            (vqldm.Encoder((8, 8), 4), inner, x),
            (vqldm.Decoder((8, 8), 4), torch.float32, z),
            (vqldm.PatchDiscriminator((8, 8)), inner, x),
            (vqldm.UNet(4, (8, 8), 1), inner, z, t),
        ):
            dtypes = []
            for layer in net.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.register_forward_hook(lambda layer, x, y: dtypes.append(y.dtype))
            assert net(*given).dtype == torch.float32
            assert {*dtypes[:-1]} == {inner} and dtypes[-1] == last


# ---- 10. From noise to images ------------------------------------------------------------------
def plain_sample(runs, cfg, label, gens):
    """ddim: eq. 12, σ = 0. ddpm: the mean of q(z_prev | z_t, z0), DDPM eq. 7, and σ² = β."""

    def noise():
        return torch.stack([torch.randn(3, 8, 8, generator=gen) for gen in gens])

    n_classes = len(runs.ldm["classes"])
    strong, young = [vqldm.UNet(3, runs.cfg.widths, n_classes, runs.cfg.upsample) for _ in range(2)]
    strong.load_state_dict(runs.ldm["ema"])
    young.load_state_dict(runs.ldm["young"])
    untold = torch.full_like(label, n_classes)
    w, c = cfg.autoguidance, cfg.class_guidance if n_classes > 1 else 1
    z = noise()
    for t, prev in runs.model.diffusion.pairs(cfg.steps):
        a, p = runs.model.diffusion.alpha_bar[[t, prev]]
        with torch.no_grad():
            t_all = torch.full((len(z),), t)
            good, weak = strong(z, t_all, label), young(z, t_all, label)
            vague = strong(z, t_all, untold)
        out = good + (w - 1) * (good - weak) + (c - 1) * (good - vague)
        eps = out if runs.cfg.target == "eps" else (1 - a).sqrt() * z + a.sqrt() * out
        z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        if cfg.sampler == "ddim":
            z = p.sqrt() * z0 + (1 - p).sqrt() * eps
        else:
            z = (p.sqrt() * (1 - a / p) * z0 + (a / p).sqrt() * (1 - p) * z) / (1 - a)
            z = z + (1 - a / p).sqrt() * noise() if prev >= 0 else z
    return z


@pytest.mark.parametrize("way", ["ddim 3 .5", "ddpm 1 2.5", "recorded"])
def test_reference_sampling_ends_with_the_papers_latents(runs, way, monkeypatch):
    """Of the running mean, led away from its younger self, and from itself untold the class, if
    there are classes. Each image has noise of its own, in any batch. recorded: as is trained."""
    plainly(monkeypatch)  # in bf16, batches of another size round apart
    how = {field.name: runs.ldm["config"][field.name] for field in fields(vqldm.Sampling)}
    if way != "recorded":
        sampler, *guidances = way.split()
        how = dict(zip(how, (sampler, 7, *map(float, guidances))))
    cfg = vqldm.SampleConfig(**how, seed=8)
    ids = torch.arange(0, 7 * 36, 7)  # as torch's integers, which are the same as Python's
    label = torch.tensor([2, 0, 1]).repeat(12) % len(runs.ldm["classes"])
    pictures, latents = runs.model.make(cfg, ids, label)  # in batches of 32 and 4
    some = [33, 4, 9]
    z = plain_sample(runs, cfg, label[some], [rng(8, "sample", 7 * i) for i in some])
    assert torch.allclose(latents[some], z, rtol=1e-4, atol=1e-4 * float(z.std()))
    mean, std = runs.ldm["scale"].view(2, 3, 1, 1)  # they are decoded by their nearest codes
    vqgan = runs.model.vqgan
    x = vqgan.decode(vqgan.codebook.nearest(latents[:4] * std + mean)).clamp(-1, 1)
    assert (pictures[:4] - ((x + 1) * 127.5)).abs().max() < 0.51


def test_a_strength_of_1_costs_no_call():
    strong, weak = Mock(return_value=5), Mock(return_value=3)
    assert vqldm.guided(strong, (weak, 1), (weak, 1.0))("z", "t") == 5 and not weak.called
    assert vqldm.guided(strong, (weak, 1.5))("z", "t") == 6 and weak.call_count == 1


# ---- 11. Stage 2: training ---------------------------------------------------------------------
def losses_of(cfg, net, z0, t, eps, label):
    """The squared error of each image's v or ε (B,)."""
    a = Diffusion(cfg.T, cfg.schedule).alpha_bar[t].view(-1, 1, 1, 1)
    goal = a.sqrt() * eps - (1 - a).sqrt() * z0 if cfg.target == "v" else eps
    out = net(a.sqrt() * z0 + (1 - a).sqrt() * eps, t, label)
    return (out - goal).square().flatten(1).mean(1)


def plain_ldm(runs):
    """Stage 2 -> UNet, its mean, the mean's younger self, held-out losses of UNet and mean, and
    the loss that the log should tell last."""
    cfg, vq_cfg, vqgan = runs.cfg, runs.vq_cfg, runs.model.vqgan
    images, train, val = drawn(vq_cfg)
    seed, B = cfg.seed, cfg.batch_size
    turned = [vqldm.augment(images, [turn] * len(images)) for turn in range(8)]
    k = torch.stack([vqgan.codebook.nearest(vqgan.encoder(x)) for x in turned], 1)
    codes = vqgan.codebook.embedding.weight[k]  # (n,8,h,w,d)
    std, mean = torch.std_mean(codes[train].double().flatten(0, -2), 0, correction=0)
    assert torch.allclose(runs.ldm["scale"].double(), torch.stack([mean, std]), 1e-3, 1e-4)
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
    t = torch.linspace(0, cfg.T - 1, len(val)).long()  # from hardly any noise to noise alone
    eps = torch.randn(z0.shape, generator=rng("held-out noise"))
    raw, held = [losses_of(cfg, m, z0, t, eps, labels[val]).detach() for m in (net, ema)]
    return net, ema, young, raw, held, logged


def test_reference_stage_2_ends_with_the_weights_of_algorithm_1(runs):
    """And with its mean, with the mean as it was after a fifth of the run, and with their losses,
    on held-out images the mean's. Latents are codes, scaled by those of all images trained on, in
    all symmetries. latent_std is of 16 samples in at most 25 steps."""
    net, ema, young, raw, held, loss = plain_ldm(runs)
    for part, want in (("model", net), ("ema", ema), ("young", young)):
        assert_same(runs.ldm[part], want)
    assert all(p.grad.any() for p in net.parameters())
    rows = runs.ldm["log"]
    assert [row["loss"] for row in rows if "loss" in row][-1] == pytest.approx(loss, 1e-3)
    assert rows[-1]["val_loss"] == pytest.approx(float(held.mean()), rel=2e-4)
    assert torch.allclose(runs.held, held, rtol=1e-3)
    assert not torch.allclose(runs.held, raw, rtol=1e-3)
    short = vqldm.replace(runs.cfg, sampler="ddim", steps=min(runs.cfg.steps, 25))
    _, z0 = runs.model.make(short, range(16), torch.arange(16) % len(runs.model.classes))
    assert rows[-1]["val_latent_std"] == pytest.approx(float(z0.std()), rel=1e-3)


def test_images_are_encoded_in_turns_that_are_fewer_the_more_there_are(calm, copy_of, monkeypatch):
    def stop(call):
        turns.append([*call.turns])
        raise vqldm.UserError("enough")

    turns, wanted = [], {("all", 2500): range(8), ("all", 2501): range(7), ("all", 20_001): (0,)}
    recorded(monkeypatch, vqldm, "encode_images", stop)
    for (kind, n), want in {**wanted, ("mirror", 99): (0, 4)}.items():
        pixels, i = torch.zeros(1, 3, 32, 32).byte(), torch.arange(n)
        pixels, ids = pixels.expand(n, -1, -1, -1), 1000 + i[:, None].expand(n, 2)
        images = vqldm.Images(pixels, i % 2, ["a", "b"], ids, i == 0)
        monkeypatch.setattr(vqldm, "read_images", lambda *a, images=images: images)
        vq = copy_of("vq", config=dict(turns=kind))
        assert cli(*STAGES["ldm"], "--vq", vq, "--out", vq / "ldm") == 2
        assert turns.pop() == [*want]
        shutil.rmtree(vq)


def test_validations_of_stage_2_draw_16_samples(calm):
    drawn = [call for call in calm.drawn if "samples" in call.path.name]
    steps = [row["step"] for row in state_of("calm/ldm/last.pt")["log"] if "val_loss" in row]
    assert [call.path.name for call in drawn] == [f"samples_step_{i:06}.png" for i in steps]
    pictures = [x for call in drawn for x in call.rows.values()]
    assert len({*bytes_of(pictures)}) > 5 and {len(x) for x in pictures} == {16}


def test_stage_2_can_have_images_of_its_own(calm, tmp_path, said):
    """With its own classes. What stage 1 saw is known here as well. A class without an image to
    train on is no matter for stage 1, which names it."""
    few = fill(tmp_path / "few", [f"{c}/{i}.bmp" for c in "ab" for i in range(9)], (9, 9, 9))
    fill(few, [f"val/{c}/{i}.bmp" for c in "ab" for i in range(4)], (99, 9, 9))
    shutil.copy(next(Path("photos/train/mole").iterdir()), few / "val/a/seen.bmp")
    state = train("ldm", tmp_path / "ldm", "--epochs", 1, "--data", few)
    told = said()
    assert "calm/vq/last.pt at step 12" in told.replace(os.sep, "/") and "WARNING" not in told
    assert state["classes"] == ["a", "b"]
    assert torch.isin(state_of("calm/vq/last.pt")["seen"], state["seen"]).all()
    fill(few, "val/wart/0.bmp", (150, 9, 9))
    train("vq", tmp_path / "vq", "--epochs", 1, "--data", few)
    assert "WARNING no image to train on of the classes wart\n" in said()


# ---- 12. Sampling and measuring ----------------------------------------------------------------
def test_sample_writes_a_folder_that_can_be_read(copy_of, elsewhere, load, monkeypatch, said):
    """All classes in turn, in lots of 64, or one, made as it was recorded, or as is typed."""
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "make")
    names = ["$mole, new", "É"]
    ldm = copy_of("ldm", config=dict(sampler="ddpm", autoguidance=1.7), classes=names)
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    typed = "--sampler ddim --steps 2 --autoguidance 4 --class é --n 5 --out one/class"
    cases = ("--n 70 --out all", ("ddpm", 3, 1.7), 35 * [0, 1]), (typed, ("ddim", 2, 4), 5 * [1])
    for words, way, want in cases:
        made.clear(), drawn.clear()
        assert cli("sample", "--ckpt", ldm, *words.split()) == 0
        out, images = Path(words.split()[-1]), torch.cat([call.result[0] for call in made])
        hows = [
            (how.sampler, how.steps, how.autoguidance) for how in (call.settings for call in made)
        ]
        assert {*hows} == {way}
        assert [int(i) for call in made for i in call.ids] == [*range(len(want))]
        assert [k for call in made for k in call.label.tolist()] == want
        again = load(out, size=32)  # files by name, so by number, and classes by metadata.csv
        assert torch.equal(again.pixels[:], images)
        assert classes_of(again) == [names[k] for k in want]
        grid = {names[k]: images[:64][torch.tensor(want[:64]) == k] for k in sorted({*want})}
        assert drawn[0].path == out / "grid.png" and same(drawn[0].rows, grid)
        assert f"std is {made[0].result[1].std():.2f}, healthy" in said()


def test_a_class_is_meant_in_any_case_but_its_exact_name_wins():
    for name, want in (("", [0, 1, 2]), ("A", [0]), ("a", [1]), ("é", [2]), ("É", [2])):
        cfg = vqldm.SampleConfig(class_=name)
        assert vqldm.wanted_classes(cfg, ["A", "a", "É"]).tolist() == want


def test_features_are_means_over_places_of_lpips_last_map(lpips):
    """Of 224×224 pixels. A larger image is smoothed before, lest it alias."""
    for side in (64, 300):
        few = (60 * randn(2, 3, side, side).clamp(-2, 2) + 128).byte()
        images = few[[0] + 5 * [1]]  # 6 are several parts
        x = F.interpolate(few / 255 * 2 - 1, (224, 224), mode="bilinear", antialias=True)
        want = lpips.net(lpips.scaling_layer(x))[-1].mean((2, 3))
        assert want.shape == (2, 512)  # so it is SqueezeNet's
        assert torch.allclose(vqldm.features(lpips, images)[[0, 5]].float(), want, atol=1e-5)


def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    """Without pairs of an image with itself, or with its twin in the other set."""

    def mean(pairs):
        return np.mean([float((u @ v / 3 + 1) ** 3) for u, v in pairs])

    a, b = randn(5, 3).double(), randn(5, 3, key=1).double() + 1
    within = sum(mean(itertools.permutations(u, 2)) for u in (a, b))
    between = mean((a[i], b[j]) for i, j in itertools.permutations(range(5), 2))
    assert vqldm.kernel_distance(a, b) == pytest.approx(within - 2 * between)


def test_the_nearest_training_image_is_found_in_all_symmetries():
    """By the distance of 32×32 means: against a search in float64, of 300 images, which are several
    parts, and of 256 and 1. Pictures are turned copies, and one is none."""
    pixels = torch.randint(256, (301, 3, 64, 64), generator=rng(1)).byte()
    small = pixels.double().unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5)) / 127.5 - 1
    every = np.stack([symmetries(x) for x in small.numpy()])
    away = np.sqrt(((every[1:] - every[0, 0]) ** 2).sum((2, 3, 4)).min(1))  # of the first picture
    for n, rows in ((300, [7, 255, 256, 257, 290, 299, 0]), (256, [0, 255]), (1, [0])):
        turned = vqldm.augment(pixels[1:][rows], torch.arange(len(rows)) + 1)
        pictures = torch.cat([pixels[:1], turned] * 50)
        distance, row = vqldm.nearest_trained(pictures, pixels[1 : n + 1])
        assert row.tolist() == [away[:n].argmin(), *rows] * 50
        assert distance[0] == pytest.approx(away[:n].min(), rel=1e-4)
        assert distance[1 : 1 + len(rows)].max() < 0.1


@pytest.fixture()
def hospital(calm, elsewhere, copy_of):
    """Photographs in the folder all: the 36 that calm's stage 2, in ldm, has seen, and 12 unseen,
    of which scars are green, and one is a training image, saved again. Two more are of patient P,
    who is known, and two of warts, which are not."""
    folder = shutil.copytree(calm.folder / "photos/train", elsewhere / "all/train").parent
    trained = sorted(folder.rglob("*.bmp"))
    seen = [vqldm.digest(hashlib.sha256(path.read_bytes()).digest()) for path in trained]
    seen.append(vqldm.digest(("patient_id", "P")))
    fill(folder, [f"mole/{i}.bmp" for i in range(7)], (180, 120, 90))
    fill(folder, [f"scar/{i}.bmp" for i in range(7)], (200, 140, 90))
    fill(folder, "wart/a.bmp wart/b.bmp")
    with Image.open(trained[0]) as again:
        again.putpixel((0, 0), (9, 9, 9))
        again.save(folder / "mole/6.bmp")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.bmp")]
    rows = [f"{name},{'P' * (name in ('mole/0.bmp', 'scar/0.bmp'))}" for name in names]
    (folder / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    Path("o/e").mkdir(parents=True)
    trained = torch.stack([vqldm.read_image(path.read_bytes(), 32) for path in trained])
    copy_of("ldm", seen=torch.tensor(seen))
    return SimpleNamespace(trained=trained, are_green=lambda x: (x[:, 1, 20, 20] > 130).tolist())


@pytest.fixture()
def measured(hospital, lpips, monkeypatch, said):
    """evaluate with nine samples, of which three are turned copies -> what it measured and drew."""
    make = ORIGINAL.LatentDiffusion.make

    def copies(self, settings, ids, label):
        pictures, z0 = make(self, settings, ids, label)
        pictures[4:7] = vqldm.augment(hospital.trained[[7, 3, 30]] // 4 * 4, [2, 5, 0])
        return pictures, z0

    monkeypatch.setattr(vqldm.LatentDiffusion, "make", copies)
    monkeypatch.setattr(vqldm, "load_lpips", lambda device: lpips)
    names = "reconstruct", "features", "nearest_trained", "draw_rows"
    reconstruct, features, nearest, drawn = [recorded(monkeypatch, vqldm, name) for name in names]
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "make")
    assert cli(*"evaluate --ckpt ldm --data all --n 9 --out o/e".split()) == 0
    numbers, told = json.loads(Path("o/e/metrics.json").read_text()), said()
    (samples, z0), (real, other) = made[0].result, [call.pixels for call in reconstruct]
    recon, perfect = [call.result[1] for call in reconstruct]
    return SimpleNamespace(**locals())


def test_evaluate_measures_two_halves_of_what_no_training_has_seen(hospital, measured):
    """In a mixture. Samples are of the classes of the first, made as it was recorded."""
    m = measured
    assert len(m.real) == len(m.other) == m.numbers["unseen_images"] == 6
    assert len({*bytes_of(m.real), *bytes_of(m.other)}) == 12
    green = hospital.are_green(m.real)
    assert {*green} == {True, False} and sum(green + hospital.are_green(m.other)) == 6
    assert m.made[0].label.tolist() == [int(green[i % 6]) for i in range(9)]
    want = dict(ckpt="ldm", data=os.path.abspath("all"), n=9, steps=3, autoguidance=1.5, class_="")
    want |= dict(latent_std=float(m.z0.std()), mse=m.reconstruct[0].result[0]["mse"], step=12)
    assert {name: m.numbers[name] for name in want} == pytest.approx(want)
    assert m.made[0].settings.steps == 3 and Path("o/cache").is_dir()
    found = {call.pixels.numpy().tobytes(): call.result for call in m.features}
    sets = dict(kernel=m.samples[:6], kernel_perfect=m.perfect)
    for name, images in {**sets, "kernel_recon": m.recon, "kernel_real": m.other}.items():
        a, b = [found[one.numpy().tobytes()] for one in (m.real, images)]
        assert m.numbers[name] == pytest.approx(vqldm.kernel_distance(a, b), rel=1e-3), name


def test_evaluate_counts_near_copies_and_draws_the_worst_first(hospital, measured):
    """At half the median of unseen images they are three of nine samples, and one unseen."""
    m = measured
    (distance, row), (usual, _) = [call.result for call in m.nearest]
    assert torch.equal(m.nearest[0].pictures, m.samples)
    assert {*bytes_of(m.nearest[1].pictures)} == {*bytes_of(m.real), *bytes_of(m.other)}
    assert {*bytes_of(m.nearest[0].trained)} == {*bytes_of(hospital.trained)}
    assert (distance < sorted(usual.tolist())[5] / 2).tolist() == [4 <= i < 7 for i in range(9)]
    want = dict(near_copies=3, near_copies_percent=100 / 3, near_copies_unseen=1)
    want |= dict(near_copies_unseen_percent=100 / 12, training_images_found=36)
    assert {name: m.numbers[name] for name in want} == pytest.approx(want)
    order = distance.argsort()
    want = m.real, m.recon, m.samples, m.samples[order], m.nearest[0].trained[row[order]]
    assert all(map(torch.equal, m.drawn[0].rows.values(), want))
    assert "look at o/e/evaluate.png and metrics.json\n" in m.told.replace(os.sep, "/")


def test_evaluate_takes_n_unseen_images_and_1000_for_what_is_usual(hospital, monkeypatch):
    """Copies are nearer than half the median of usual distances, 1 and 100. 16 are drawn."""

    def many(*a):
        rows, label = ORIGINAL.unseen_images(*a)
        return rows.repeat(100), label

    def nearest(pictures, trained):
        given.append(len(pictures))
        i = torch.arange(len(pictures))
        return i / 10 if len(i) == 20 else torch.where(i < 600, 1.0, 100.0), 0 * i

    given = []
    monkeypatch.setattr(vqldm, "unseen_images", many)
    monkeypatch.setattr(vqldm, "nearest_trained", nearest)
    calls, drawn = [recorded(monkeypatch, vqldm, name) for name in ("reconstruct", "draw_rows")]
    assert cli(*"evaluate --ckpt ldm --data all --n 20".split()) == 0
    assert [len(call.pixels) for call in calls] == [20] and given == [20, 1000]
    assert [len(x) for x in drawn[0].rows.values()] == [20, 20, 20, 16, 16]
    assert json.loads(Path("ldm/metrics.json").read_text())["near_copies"] == 5


def test_evaluate_measures_one_class(hospital, monkeypatch):
    """The same at any seed. Without LPIPS no kernels, without --out its place is the model's."""
    shutil.rmtree("all/train")
    Path("all/metadata.csv").unlink()
    Path("runs/samples").mkdir(parents=True)
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "make")
    for seed in (0, 7):
        assert cli(*f"evaluate --ckpt ldm --data all --class SCAR --n 4 --seed {seed}".split()) == 0
        assert all(hospital.are_green(calls[-1].pixels)) and made[-1].label.tolist() == [1] * 4
        assert torch.equal(calls[-1].pixels, calls[0].pixels) and len(calls[-1].pixels) == 3
    assert not [*Path("runs/samples").iterdir()]
    numbers = json.loads(Path("ldm/metrics.json").read_text())
    assert numbers["class_"] == "SCAR" and numbers["training_images_found"] == 0
    assert not [name for name in numbers if "kernel" in name or "near" in name]


def test_a_model_without_classes_is_measured_on_all_images(hospital, monkeypatch):
    state = state_of("ldm/last.pt")
    state["config"]["unconditional"], state["classes"] = True, ["images"]
    for part in ("ema", "young"):
        state[part]["label.weight"] = state[part]["label.weight"][:2]
    torch.save(state, "ldm/last.pt")
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "make")
    assert cli(*"evaluate --ckpt ldm --data all --n 20".split()) == 0
    assert len(calls[0].pixels) == 7 and made[0].label.tolist() == [0] * 20


# ---- A. Drawn lesions --------------------------------------------------------------------------
def test_drawn_images_follow_from_seed_and_number_alone(load, monkeypatch):
    """In whatever order, and kept by seed on disk, also for the run that made them. No two are
    alike. Another processor may round pixels otherwise, so number and seed mark them."""

    def draw(n, seed):
        return load("synthetic", size=24, n_images=n, seed=seed)

    maps, here, zero = recorded(monkeypatch, torch, "load"), draw(8, 1), draw(9, 0)
    assert here.pixels is maps[0].result["pixels"] and maps[0].mmap
    for i in range(7, -1, -1):
        assert torch.equal(here.pixels[i], vqldm.synthetic(i, 24, 1))
    assert len(torch.cat([here.pixels, zero.pixels]).unique(dim=0)) == 17
    assert torch.equal(draw(8, 0).pixels[:], zero.pixels[:8])
    monkeypatch.setattr(vqldm, "write_whole", Mock(side_effect=ZeroDivisionError))
    assert torch.equal(draw(8, 1).pixels[:], here.pixels[:])  # it is read, not drawn
    monkeypatch.undo()
    monkeypatch.setattr(vqldm, "synthetic", lambda *a: 255 - ORIGINAL.synthetic(*a))
    negative = draw(8, 1)  # by other code, so not from the cache
    assert torch.equal(negative.pixels[:], 255 - here.pixels[:])
    assert torch.equal(negative.ids, here.ids)
    assert len(torch.cat([here.ids, zero.ids])[:, 0].unique()) == 17


def test_drawn_classes_take_turns_and_differ_in_colour(load):
    """For each two, the mean or the scatter of one of the three colours in the middle differs by
    more than four standard errors. (This is Welch's t.) Vascular lesions are reddest."""
    images = load("synthetic", size=24, n_images=160)
    assert images.classes == sorted(vqldm.LESIONS) and not images.test.any()
    assert images.labels.tolist() == [0, 1, 2, 3] * 40
    middle = images.pixels[..., 6:18, 6:18].float().flatten(2).view(40, 4, 3, -1)
    scores = torch.cat([middle.mean(3), middle.std(3)], 2)  # (40 images, 4 classes, 6)
    for a, b in itertools.combinations(scores.unbind(1), 2):
        error = ((a.var(0) + b.var(0)) / 40).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() / error).max() > 4
    red, green, _ = middle.mean((0, 3)).T
    assert (red - green).argmax() == list(vqldm.LESIONS).index("vascular-like")
    today = torch.tensor([207.72, 157.50, 145.74])  # if they are drawn otherwise, put their means
    assert torch.allclose(images.pixels.float().mean((0, 2, 3)), today, atol=0.5)


def test_borders_are_as_ragged_as_their_class(monkeypatch):
    def grey(ragged):  # only its border depends on ragged
        monkeypatch.setattr(vqldm, "LESIONS", {"": (4 * "808080", ragged, 0)})
        return vqldm.synthetic(0, 64)

    assert (grey(0.04) != grey(0.2)).float().mean() > 0.02


# ---- B. A folder of images: reading ------------------------------------------------------------
def mesh(height, width, cell):
    """Black and white squares of cell pixels, which are grey from far away."""
    white = (np.indices((height, width)) // cell).sum(0) % 2 * 255
    return np.stack([white] * 3, 2).astype(np.uint8)


def test_the_middle_square_is_scaled_smoothly_and_turned(read):
    """A mesh of single pixels comes out grey, with what lies beside it, red, cut off. One of 4×4
    pixels at four times the size stays a mesh, also if a JPEG is decoded at a part of its size.
    What a camera says that it has turned is turned back."""
    wide, coarse, mirrored = mesh(40, 80, 1), mesh(64, 64, 4), Image.Exif()
    wide[:, :19] = wide[:, 61:] = 255, 0, 0
    for name, pixels in (("wide.png", wide), ("high.png", wide.transpose(1, 0, 2).copy())):
        assert (read(Image.fromarray(pixels), name) - 128).abs().max() < 20
    image = read(Image.fromarray(coarse), "a.jpg", quality=95)
    assert (image[0] - torch.from_numpy(coarse[::4, ::4, 0])).abs().max() < 40
    mirrored[0x0112] = 2
    image = read(picture(), "b.jpg", exif=mirrored)
    assert image[0, 8, 3] < 9 < image[0, 8, 12]  # red is right


@pytest.mark.filterwarnings("error")  # as PIL's of a palette's transparency
def test_what_is_transparent_is_white_whatever_lies_below(read):
    """Below lies green, or grey 150. On the right is blue, or grey 29."""
    colours, grey, alpha = picture(left="lime"), picture("L", 150, 29), picture("L", 0, 255)
    rgba, indexed = Image.merge("RGBA", [*colours.split(), alpha]), colours.quantize()
    key = dict(transparency=indexed.getpixel((0, 0)))
    files = [(rgba, "png", {}), (rgba.convert("PA"), "tif", {}), (indexed, "png", key)]
    files += [(Image.merge("LA", [grey, alpha]), "png", {}), (grey, "png", dict(transparency=150))]
    for i, (im, kind, how) in enumerate(files):
        image = read(im, f"{i}.{kind}", **how)
        assert image[:, 8, 3].tolist() == [255] * 3, (im.mode, kind, how)
        assert image[:, 8, 12].tolist() == ([29] * 3 if im.mode[0] == "L" else [0, 0, 255])


def test_images_are_read_and_all_else_is_passed_over(tmp_path, load, said, monkeypatch):
    """Each in its row. Bad ones are named, others not opened, and links to folders not followed."""
    names = "0.bmp 1.gif 2.jpeg 3.jpg 4.png 5.tif 6.tiff 7.webp 8.jpe 9.jfif a/train/8.png".split()
    names += ["b/ä b.JPeG", "z.TIFF"]
    folder = fill(tmp_path / "photos", [*names, "cut.jpg"], size=(200, 200))
    for name, mode in (("0.bmp", "L"), ("4.png", "LA"), ("5.tif", "CMYK"), ("6.tiff", "P")):
        Image.open(folder / name).convert(mode).save(folder / name)
    rest = "a.txt .git/x.png b.heic c.HEIF d.avif e.jp2 f.mpo g.jxl .hidden.png a/.b/c/1.png png"
    for name in [*rest.split(), "c/text.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    (folder / "album.jpg").mkdir()
    if os.name != "nt":
        (folder / "a/up").symlink_to("..")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.new("F", (9, 9)).save(folder / "floats.tiff")  # they would be black
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "deep.png")
    Image.new("L", (400, 400)).save(folder / "giant.png")  # PIL calls it a bomb
    Image.new("RGB", (9, 9)).save(folder / "x.eps")  # as a .png, no order to start Ghostscript
    (folder / "x.eps").rename(folder / "x.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript := Mock(side_effect=OSError))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    images = load(folder)
    bad = "c/text.jpg cut.jpg deep.png floats.tiff giant.png x.png".split()
    assert re.findall(r"WARNING skipped (\S+) \w+\(", said()) == bad and not ghostscript.called
    assert classes_of(images) == ["images"] * 10 + ["a", "b", "images"]
    assert images.classes == ["a", "b", "images"]  # but not c
    assert len(images.pixels[:].unique(dim=0)) == 13
    assert images.pixels[10:, 0, 8, 3].tolist() == [10, 11, 12]


def test_what_the_program_drew_is_no_image_of_a_folder(tmp_path):
    """Whether a run is in it, or it is a run's. What is not beside a run's files is the user's."""
    ours = "recon_step_000012.png samples_step_1234567.png curves.png evaluate.png".split()
    theirs = [f"a/{name}" for name in [*ours, "0.bmp", "grid.png"]] + ["0.bmp", "runs/vq/0.bmp"]
    folder = fill(tmp_path / "photos", theirs)
    for place, mark in (("", "last.pt"), ("runs/vq", "last.pt"), ("e", "metrics.json")):
        fill(folder / place, ours)
        (folder / place / mark).touch()
    samples = fill(folder / "runs/samples", "00000.png grid.png")
    (samples / "metadata.csv").touch()
    assert vqldm.list_images(folder) == sorted(theirs)
    assert "00000.png" in vqldm.list_images(samples)  # which are read if they are named


def test_unconditional_makes_one_class_of_all(tmp_path, load):
    folder = fill(tmp_path / "all", "a/1.bmp b/1.bmp")
    assert classes_of(load(folder, unconditional=True)) == ["images", "images"]
    assert classes_of(load(folder)) == ["a", "b"]  # from the same cache


@pytest.fixture()
def fresh(load, monkeypatch):
    """A function that reads a folder twice -> Images, which must have been decoded once."""
    decoded = recorded(monkeypatch, vqldm, "decode_images")

    def call(folder, **how):
        decoded.clear(), load(folder, **how)
        images = load(folder, **how)
        assert len(decoded) == 1
        return images

    return call


def test_the_cache_sees_each_stamp_of_a_file(tmp_path, fresh, monkeypatch):
    folder, stat = fill(tmp_path / "all", "a/1.bmp b/1.bmp"), Path.stat
    stamps = "st_mtime_ns", "st_ctime_ns", "st_size", "st_ino"
    for name in ("none", *stamps):
        with monkeypatch.context() as patch:
            alike = Mock(**{**dict.fromkeys(stamps, 0), name: 7, "st_mode": stat(folder).st_mode})
            patch.setattr(Path, "stat", lambda *a, alike=alike, **how: stat(*a, **how) and alike)
            fresh(folder)


def test_the_cache_sees_folder_class_size_pillow_and_code(tmp_path, load, fresh, monkeypatch):
    folder = fill(tmp_path / "all", "a/1.bmp b/1.bmp")
    assert fresh(folder).classes == ["a", "b"]
    other = fresh(fill(tmp_path / "other", "a/1.bmp b/1.bmp", (5, 0, 99)))
    assert other.pixels[:, 0, 8, 3].tolist() == [5, 6]
    (folder / "metadata.csv").write_text("image,class\na/1.bmp,mole\nb/1.bmp,scar")
    assert fresh(folder).classes == ["mole", "scar"]
    assert fresh(folder, size=32).pixels.shape == (2, 3, 32, 32)
    assert load(folder).pixels.shape[2] == 16
    monkeypatch.setattr(vqldm.Image, "__version__", "0")
    fresh(folder)
    monkeypatch.setattr(vqldm, "read_image", lambda *a: torch.zeros(3, 16, 16).byte())
    assert not fresh(folder).pixels[:].any()
    for part in (None, vqldm.decode_images, vqldm.Images):
        monkeypatch.setattr(inspect, "getsource", lambda one, part=part: str((one, one is part)))
        fresh(folder)


def test_a_damaged_cache_is_refused(tmp_path, load):
    folder = fill(tmp_path / "all", "1.bmp")
    load(folder)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(vqldm.UserError, match="cache.*is damaged, delete it"):
        load(folder)


def test_what_cannot_be_read_now_ends_the_run(tmp_path, load, monkeypatch, refused):
    """Lest a class is left out. It is there next time. A lack of memory is no image's fault."""
    locked = PermissionError(13, "no", "out of memory.bmp")
    places = {"os.scandir": locked, "pathlib.Path.read_bytes": locked}
    for place, error in {**places, "PIL.Image.open": MemoryError()}.items():
        folder = fill(tmp_path / place, "a/1.bmp b/1.bmp b/val/2.bmp")
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            told = refused("train-vq", "--size", 32, "--data", folder, "--out", tmp_path / "vq")
        assert "out of memory" in told and len(load(folder, size=32).labels) == 3


# ---- B. A folder of images: classes and groups -------------------------------------------------
def test_folders_tell_the_class_and_what_is_held_out(tmp_path, load):
    """The class is the innermost folder that is no part of a set. (latest ends in test, but is.)"""
    want = {"a.bmp": ("images", False), "testing/a.bmp": ("images", True)}
    for part in "Test testing VALID val validation training Train".split():
        for kind in ("basal cell carcinoma", "latest", "runs"):
            place = f"{part}/x/{kind}" if "i" in part else f"{kind}/{part}"
            want[f"{place}/1.bmp"] = kind, part not in ("training", "Train")
    names = sorted(want)
    images = load(fill(tmp_path / "Skin/test", names))
    assert [*zip(classes_of(images), images.test.tolist())] == [want[name] for name in names]


def cases(text):
    """-> the cells of each case of a table in text. A line that begins with a blank goes on."""
    found = re.split(r"\n(?=\S)", text.strip())
    return [[cell.strip() for cell in case.split("|")] for case in found]


def test_a_group_is_a_patient_else_a_lesion_else_all_copies_of_an_image(tmp_path, load):
    """Known by their words, and images by their content, wherever they are."""
    names = "0.bmp 1.bmp 2.bmp copies/2.bmp copies/3.bmp".split()
    folder = fill(tmp_path / "all", names)
    shutil.copy(folder / "2.bmp", folder / "copies")
    rows = [f"{name},{ids}" for name, ids in zip(names, ("P,L", ",L", ",", ",", "P,"))]
    (folder / "metadata.csv").write_text("\n".join(["image,patient_id,lesion_id", *rows]))
    content = [hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    keys = ("patient_id", "P"), ("lesion_id", "L"), content[2], content[2], ("patient_id", "P")
    want = [[vqldm.digest(one), vqldm.digest(key)] for one, key in zip(content, keys)]
    assert load(folder).ids.tolist() == want


# what is proved | table, with / for a new line | classes of 0, C, a/1 and a/2 | what is told
TABLES = r"""
the first that is filled in any row | isic_id, diagnosis_3, diagnosis_1,dx / 0,,Benign,a / 1, ,Bad
  / 2,NA,,b / C,,Bad | Benign Bad Bad unknown | by diagnosis_1 - images split by {'image': 4}
the first counts, wherever it stands | image,diagnosis_1,isic_id,diagnosis_3 / 9,x,0,a / 9,x,C,b
  / 9,x,1,c / 9,x,2,d | a b c d | by diagnosis_3
the folder, if none is filled | image,dx / 0, / C,N/A / 1,none / 2,Unknown | images images a a
  | classes by folder
titles are exact | image,Diagnosis,color / 0,x,y / C,x / 1,x / 2,x | images images a a | folder
what is named is used | image ,dx ,patient_id / 0,mole,P / a/1,,P / 1.bmp,,P / 9,x, / 2,scar,NaN
  | mole unknown scar | 2 rows without a file, 1 files & by {'patient_id': 2, 'image': 1}
  & 3 images in 2 groups
a name is a path, a name in a folder, or a stem | file_name,image,class / C,0,a / 0.bmp,,b
  / a/1.bmp,,c / 2.bmp,,d | b a c d | 0 rows without a file, 0 files without a row
a comma too many | image,class / 0,a, / C,b,,x / 1,c / 2,d | a b c d | by class
quotes and commas | image,"class" / 0,"a, ""b"" c" / C,b / 1,c / 2,d | a,~"b"~c b c d | by class
patients, else lesions | image,lesion_id,patient_id / 0,L,P / C,M,P / 1,L, / 2,L,NA | images images
  a a | split by {'patient_id': 2, 'lesion_id': 2} & 4 images in 2 groups
who is not known is not one patient, but 0 is one | image,patient_id / 0,unknown / C,N/A / 1,0 / 2,0
  | images images a a | split by {'image': 2, 'patient_id': 2} & 4 images in 3 groups
no column of images | name,dx / 0,scar | refused | none of the columns & only ['name', 'dx']
nothing in it | | refused | none of the columns & only []
a name twice | image / 1 / 0 / 1 | refused | names 1 twice
a file under two names | image / 1 / a/1.bmp | refused | names a/1.bmp twice
two files for one name | image / 0 / 3 | refused | 3 may be any of ['3.bmp', 'b/3.bmp']
a whole path has one file | image,class / 3.bmp,a / b/3.bmp,b | a b | 0 rows without a file
a quote that never ends | isic_id,dx / 0,a / 1,"b / 2,c | refused | metadata.csv: cannot be read
another encoding | isic_id,dx / 0,LATIN | refused | metadata.csv: cannot be read
no image of the folder | image / 9.bmp / 0.BMP / c | refused | or its metadata.csv names none
only a head | image,dx | refused | no images are there"""


def test_metadata_csv_alone_tells_images_and_classes_or_is_refused(tmp_path, load, said):
    """It is as Excel writes it. Other tables are not looked at. What may mean two things ends."""
    for i, (proved, table, classes, told) in enumerate(cases(TABLES)):
        names = "0.bmp C.bmp a/1.bmp a/2.bmp" + " 3.bmp b/3.bmp" * ("/ 3" in table)
        folder = fill(tmp_path / str(i), names)
        (folder / "other.csv").write_text("image,class\n0,other\n1,other")
        content = re.sub(r"\s*/\s+", "\n", table).encode("utf-8-sig")
        (folder / "metadata.csv").write_bytes(content.replace(b"LATIN", b"\xe9"))
        try:
            found, words = classes_of(load(folder)), said()
        except vqldm.UserError as e:
            found, words = ["refused"], str(e)
        assert found == [name.replace("~", " ") for name in classes.split()], proved
        assert all(one in words for one in re.split(r"\s+& ", told)), (proved, words)


# ---- C. Keeping a run: stop and resume ---------------------------------------------------------
def handlers():
    """What Ctrl-C and SIGTERM do."""
    return [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("case", ["vq 0 INT", "vq 5 TERM", "vq 11 INT", "ldm 2 INT", "ldm 9 TERM"])
def test_stopped_and_resumed_is_the_undisturbed_run(calm, tmp_path, monkeypatch, said, case):
    """Bit for bit. A signal in this step ends the run after it, Ctrl-C after that would end it at
    once, and then both do again what they did. The run may be moved, and --vq may be gone."""
    stage, stop, number = case.split()
    number, stop, usual, second = getattr(signal, f"SIG{number}"), int(stop), handlers(), []
    out, vq = tmp_path / "a run", shutil.copytree("calm/vq", tmp_path / "vq")

    def ask(call):
        if call.step == stop:
            signal.raise_signal(number)
            second.append(handlers()[0])

    with monkeypatch.context() as patch:
        recorded(patch, vqldm, "next_rows", ask)
        words = [*STAGES[stage], "--out", out, *["--vq", vq][: 2 * (stage == "ldm")]]
        assert cli(*words) == 128 + number
    assert second == [signal.default_int_handler] and handlers() == usual
    assert state_of(out / "last.pt")["step"] == stop + 1
    told = said().splitlines()[-1]
    assert told.startswith("next: ") == (stop == 11) and told.endswith("--resume") == (stop < 11)
    shutil.rmtree(vq)
    moved = out.rename(tmp_path / "moved")
    assert cli(STAGES[stage][0], "--resume", "--out", moved) == 0
    one, two = [state_of(Path(folder, "last.pt")) for folder in (f"calm/{stage}", moved)]
    for state in (one, two):  # the same in all but place and time
        state["config"].update(out="", vq="", resume=0, epochs=0)
    assert [part for part in one.keys() | two.keys() if not same(one[part], two[part])] == []
    assert Path(f"calm/{stage}/log.json").read_bytes() == (moved / "log.json").read_bytes()
    assert not out.exists()


def test_a_finished_run_stays_as_it_is_or_grows(calm, copy_of, tmp_path, monkeypatch):
    """It had three epochs of four steps. Other files in its folder stay, photographs may have
    moved, and a checkpoint is on the disk before it has its name."""
    out, photos = copy_of("ldm"), shutil.copytree("photos", tmp_path / "moved")
    (out / "metrics.json").write_text("somebody's")
    bars, order = recorded(monkeypatch, vqldm, "bar"), []
    for name in ("fsync", "replace"):
        recorded(monkeypatch, os, name, lambda call, name=name: order.append(name))
    for epochs, steps, data in ((3, 0, "photos"), (3.5, 2, photos)):
        bars.clear()
        words = "train-ldm --resume --autoguidance 2 --out".split()
        assert cli(*words, out, "--epochs", epochs, "--data", data) == 0
        old, new = state_of("calm/ldm/last.pt"), state_of(out / "last.pt")
        assert new["step"] == 12 + steps
        assert same(new["ema"], old["ema"]) == (steps == 0)
        assert [call.total for call in bars if call.name == "training"] == [steps]
        changed = {name for name in old["config"] if old["config"][name] != new["config"][name]}
        assert changed - {"epochs"} == {"resume", "autoguidance", "out", "data"}
        assert new["config"]["data"] == os.path.abspath(data)
    assert (out / "metrics.json").read_text() == "somebody's"
    assert len(order) > 4 and order == ["fsync", "replace"] * (len(order) // 2)


@pytest.mark.parametrize("stage, preset", [("vq", ""), ("vq", "report"), ("ldm", "report")])
def test_a_run_ends_with_what_to_look_at_and_type(calm, tmp_path, monkeypatch, said, stage, preset):
    """And begins with how many steps there are. Its folder has a blank, so it must be quoted."""
    out, preset = tmp_path / "a run", ["--preset", preset] if preset else []
    drawn, curves = [recorded(monkeypatch, vqldm, name) for name in ("draw_rows", "draw_curves")]
    train(stage, out, *preset, "--epochs", 0.01)
    *_, steps, validation, pictures, command = said().splitlines()
    assert (steps, validation[:9]) == ("steps to go: 1 of 1", "100% val:")
    assert [pictures] == [f"look at {a.path} and {b.path}" for a, b in zip(drawn, curves)]
    words = ["train-ldm", *preset, "--vq"] if stage == "vq" else ["sample", "--ckpt"]
    assert shlex.split(command) == ["next:", "python", "vqldm.py", *words, str(out)]
    cls, _ = vqldm.COMMANDS[words[0]]
    vqldm.settle(cls, vars(vqldm.parser_of(words[0], cls).parse_args([*words[1:], str(out)])))


def another(field, value):
    """-> a value of a setting as it can be typed, which is not this one. Flags need none."""
    if field.type is bool:
        return []
    if get_args(field.type):
        return [next(one for one in get_args(field.type) if one != value)]
    if isinstance(value, (int, float)):
        return [value // 2 or 1 if isinstance(value, int) else value / 2 or 1]
    return ["9,9,9"] if isinstance(value, tuple) else ["elsewhere"]


def test_a_resume_changes_only_what_it_can(copy_of, refused):
    """It may move, grow, and sample otherwise. Each other setting is refused with what it was."""
    may_change = {"resume", "out", "device", "data", "epochs"}
    may_change |= {"sampler", "steps", "autoguidance", "class_guidance"}
    for stage, cls in (("vq", vqldm.VQConfig), ("ldm", vqldm.LDMConfig)):
        out = copy_of(stage)
        config = state_of(out / "last.pt")["config"]
        assert config.keys() == {field.name for field in fields(cls)}
        for field in fields(cls):
            value = config[field.name]
            flag = [f"--{field.name.replace('_', '-')}", *another(field, value)]
            if field.name not in may_change:
                words = f"train-{stage}", "--resume", "--out", out, *flag
                assert f": {field.name} was {value}\n" in refused(*words)
            elif field.name not in ("resume", "out"):
                typed = vars(vqldm.parser_of(f"train-{stage}", cls).parse_args(map(str, flag)))
                cfg, _ = vqldm.settle(cls, {**typed, "resume": True, "out": str(out)})
                assert getattr(cfg, field.name) == typed[field.name] != value
    words = f"train-vq --resume --codes 9 --size 32 --seed 1 --lr .002 --out {out.parent / 'vq'}"
    assert ": codes was 16, lr was 0.001, seed was 0\n" in refused(*words.split())


def test_a_resume_without_what_it_began_with_is_refused(copy_of, monkeypatch, refused):
    """Steps, classes, or LPIPS, which is here now. Nothing is written."""
    monkeypatch.setattr(vqldm, "load_lpips", lambda device: Mock())
    for stage, epochs, told, parts in (
        ("vq", 2, "fewer --epochs", {}),
        ("ldm", 4, "classes", dict(classes=["mole", "wart"])),
        ("vq", 4, "LPIPS", dict(lpips=True)),
        ("vq", 4, "LPIPS", dict(config=dict(lpips_weight=0.1))),
    ):
        folder = copy_of(stage, **parts)
        before = (folder / "last.pt").read_bytes()
        assert told in refused(f"train-{stage}", "--resume", "--epochs", epochs, "--out", folder)
        assert (folder / "last.pt").read_bytes() == before
        shutil.rmtree(folder)


# ---- C. Keeping a run: checkpoints -------------------------------------------------------------
BROKEN = {  # what last.pt holds, made from the dict in a whole one
    "empty": lambda s: b"",
    "cut": lambda s: Path("calm/ldm/last.pt").read_bytes()[:-5000],
    "a list": lambda s: [1, 2],
    "objects, which may run code": lambda s: dict(s, more=Path("x")),
    "alien": lambda s: dict(s, config=dict(s["config"], beyond=1)),
    "older": lambda s: dict(s, version=7),
}
for name in ("version", "stage", "config"):
    BROKEN["no " + name] = lambda s, name=name: {part: s[part] for part in s.keys() - {name}}


@pytest.mark.parametrize("how", BROKEN)
def test_a_checkpoint_not_ours_or_not_whole_is_refused(calm, tmp_path, how):
    content, path = BROKEN[how](state_of("calm/ldm/last.pt")), tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    told = "is of version 7, train it anew" if how == "older" else "is no checkpoint"
    with pytest.raises(vqldm.UserError, match=f"^--x .*last.pt: {told}"):
        vqldm.load_checkpoint(tmp_path, "--x", "ldm")


def test_a_full_disk_or_memory_harms_no_checkpoint(copy_of, tmp_path, monkeypatch, refused):
    """As torch reports it. No half of a file is left, and a folder may be used again."""
    out, new = copy_of("vq"), [*STAGES["vq"], "--out", tmp_path / "new"]
    before = (out / "last.pt").read_bytes()
    errors = [RuntimeError("[enforce fail at inline_container.cc] No space"), MemoryError]
    places = "torch.save torch.load vqldm.augment vqldm.augment".split()
    for place, error in zip(places, [*errors, *vqldm.NO_MEMORY]):
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            told = "No space" if "save" in place else "out of memory"
            assert told in refused("train-vq", "--resume", "--epochs", 4, "--out", out)
            assert (out / "last.pt").read_bytes() == before
            assert told != "No space" or told in refused(*new)
        assert not [*tmp_path.glob("*/.*")]
    assert not (tmp_path / "new/last.pt").exists()


def test_an_error_is_raised_and_signals_do_again_what_they_did(calm, tmp_path, monkeypatch):
    usual = handlers()
    monkeypatch.setattr(vqldm, "augment", Mock(side_effect=RuntimeError("memory leak")))
    with pytest.raises(RuntimeError, match="leak"):
        cli(*STAGES["vq"], "--out", tmp_path / "new")
    assert handlers() == usual


def test_ctrl_c_outside_of_training_ends_at_once(calm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vqldm, "read_images", Mock(side_effect=KeyboardInterrupt))
    assert cli(*STAGES["vq"], "--out", tmp_path / "x") == 130 and not (tmp_path / "x").exists()
    assert capsys.readouterr().err == "vqldm: stopped\n"


def test_a_checkpoint_of_a_gpu_can_be_read_without_one(calm, tmp_path, monkeypatch):
    state = state_of("calm/vq/last.pt")
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(state, tmp_path / "last.pt")
    assert vqldm.load_checkpoint(tmp_path, "--x", "vq")["step"] == 12


def test_of_two_starts_in_one_folder_the_second_fails(calm, tmp_path, monkeypatch, refused):
    """Though it looked there before the other's first save. (torchrun begins one.)"""
    vq, out = tmp_path / "vq", fill(tmp_path / "samples")

    def meanwhile(name, other):
        monkeypatch.setattr(vqldm, name, lambda *a: (other(), getattr(ORIGINAL, name)(*a))[1])

    meanwhile("read_images", lambda: shutil.copytree("calm/vq", vq))
    assert "another run" in refused(*STAGES["vq"], "--out", vq)
    assert (vq / "last.pt").read_bytes() == Path("calm/vq/last.pt").read_bytes()
    meanwhile("restore_ldm", lambda: (out / "metadata.csv").write_text("the other's"))
    assert "another run" in refused("sample", "--ckpt", "calm/ldm", "--out", out)
    assert [one.read_text() for one in out.iterdir()] == ["the other's"]
    monkeypatch.setattr(vqldm, "RANK", 1)
    vqldm.settle(vqldm.VQConfig, {"out": str(vq)})  # which must not raise


def test_validations_come_at_tenths_and_each_ten_minutes(tmp_path, monkeypatch):
    """Each is saved before its curves are drawn. The bar shows the losses that are logged."""
    saved, clock, line = [], Mock(return_value=600), MagicMock()
    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.setattr(vqldm, "bar", lambda *a: line)
    line.__enter__.return_value = line
    run = vqldm.Run(vqldm.VQConfig(out=str(tmp_path), batch_size=1, epochs=45), 1, {}, None)

    def drawn(path, log):
        assert path == tmp_path / "curves.png" and log is run.log
        saved.append(state_of(tmp_path / "last.pt")["log"][-1]["val_b"])

    monkeypatch.setattr(vqldm, "draw_curves", drawn)
    for step in run:
        clock.return_value = 600 if step < 11 else 1201
        if run.end_step({"a": torch.tensor(2.0)}):
            run.end_validation({"b": run.step})
    assert saved == [5, 9, 12, 14, 18, 23, 27, 32, 36, 41, 45]
    assert [row["step"] for row in run.log if "a" in row] == [10, 20, 30, 40]
    assert [call.args for call in line.set_postfix.call_args_list] == 4 * [({"a": 2.0},)]
    assert line.update.call_count == 45


def test_a_validation_is_saved_before_it_is_drawn(calm, tmp_path, monkeypatch, refused):
    """Lest a full disk costs more. 8 of the 30 images are a step."""
    monkeypatch.setattr(vqldm, "draw_rows", Mock(side_effect=[None, OSError(28, "No space")]))
    assert "No space" in refused(*STAGES["vq"], "--epochs", 2.5, "--out", tmp_path)
    assert state_of(tmp_path / "last.pt")["step"] == 2


# ---- C. Keeping a run: several processes, and what can go wrong --------------------------------
class TwoProcesses:
    """Two threads stand in for them. The second starts when the first waits for it, in its first
    all_reduce. By then the first has made its networks, for which both need torch's one seed. This
    is also RANK, the number of the thread's process."""

    def __init__(self, patch):
        self.mine, self.meeting, self.waits = local(), Barrier(2), Event()
        self.given = [None, None]
        beside(patch)
        patch.setattr(vqldm, "RANK", self)
        patch.setattr(vqldm, "dist", Mock(all_reduce=self.all_reduce))
        patch.setattr(vqldm, "signal", Mock())  # it is for the main thread alone
        patch.setattr(torch.cuda, "is_available", lambda: False)

    def __index__(self):
        return self.mine.rank

    def __eq__(self, other):
        return self.mine.rank == other

    def all_reduce(self, x):
        self.given[self.mine.rank] = x.clone()
        self.waits.set()
        self.meeting.wait(60)
        x.copy_(self.given[0] + self.given[1])
        self.meeting.wait(60)

    def run(self, words):
        """A command in both -> their exit statuses."""

        def process(rank):
            self.mine.rank = rank
            assert rank == 0 or self.waits.wait(60)
            return cli(*words)

        with ThreadPoolExecutor() as pool:
            return [*pool.map(process, (0, 1))]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_with_the_weights_of_one(calm, tmp_path, monkeypatch, said, stage):
    """Only the first speaks, validates and saves. (No Muon, which enlarges rounding.)"""
    words = "--epochs 1 --balance".split()
    if stage == "vq":
        words = "--muon-lr 0 --gan-start 0 --lam-max 1e4 --d-lr .001 --data synthetic --n-images 90"
        words = f"{words} --epochs 1 --batch-size 20".split()
    one = train(stage, tmp_path / "one", *words)
    told_by_one = said()
    two, saved_by = TwoProcesses(monkeypatch), []
    recorded(monkeypatch, vqldm, "write_whole", lambda call: saved_by.append(two.mine.rank))
    assert two.run([*STAGES[stage], *words, "--out", tmp_path / "two"]) == [0, 0]
    assert {*saved_by} == {0} and vqldm.dist.destroy_process_group.call_count == 2
    heads = [re.sub(r"val:.*|/(one|two)", "", told).splitlines() for told in (told_by_one, said())]
    assert heads[0] == heads[1] and len(heads[0]) > 6
    state = state_of(tmp_path / "two/last.pt")
    for part in {"model", "disc", "ema", "young"} & one.keys():
        for name, a in one[part].items():
            b = state[part][name] * (2 if name == "codebook.wins" else 1)  # each counted its half
            assert (a - b).norm() <= 1e-3 * a.norm() + 1e-5, (part, name)


def test_processes_of_torchrun_train_each_on_its_gpu(monkeypatch):
    """They meet after each took the GPU of its number."""
    did = Mock()
    beside(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(vqldm.dist, "init_process_group", did.meet)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", did.take)
    assert cli("sample", "--help") == 0
    assert [str(one) for one in did.mock_calls] == ["call.take(3)", "call.meet()"]


def test_a_signal_to_one_process_stops_all(tmp_path, monkeypatch):
    for i, (mine, other) in enumerate(((0, 0), (0, 15), (2, 0), (2, 15))):
        beside(monkeypatch, float(other))
        run = vqldm.Run(vqldm.VQConfig(out=str(tmp_path / str(i))), 8, {}, None)
        run.signal = mine
        assert next(iter(run), "stopped") == (0 if mine == other == 0 else "stopped")


def test_torchrun_is_for_training_in_batches_that_can_be_shared(elsewhere, monkeypatch, refused):
    monkeypatch.setattr(vqldm, "WORLD", 3)
    for command in ("sample", "evaluate"):
        assert "torchrun is for training" in refused(command)
    words = "train-vq --size 32 --n-images 60 --lpips-weight 0 --out new --batch-size 8"
    assert "--batch-size" in refused(*words.split()) and not Path("new").exists()


# ---- D. Pictures -------------------------------------------------------------------------------
@pytest.mark.parametrize("side, times", [(8, 2), (63, 2), (64, 1)])
def test_rows_of_pictures_are_drawn_under_their_names(tmp_path, side, times):
    """At most 16 of each, two pixels apart, twice as large below 64 pixels. No row is empty."""
    images = torch.randint(256, (20, 3, side, side), generator=rng("rows")).byte()
    path, rows = tmp_path / "new/grid.png", {"many": images, "none": images[:0], "p": images[:3]}
    ORIGINAL.draw_rows(path, rows)
    side, images = side * times, images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    sheet, height = np.moveaxis(np.array(Image.open(path)), 2, 0), side + 18
    assert sheet.shape == (3, 2 * height, 2 + 16 * (side + 2))
    for top, few in ((0, images[:16]), (height, images[:3])):
        assert sheet[:, top : top + 13].min() < 128  # a name
        for i, image in enumerate(few):
            left, below = 2 + (side + 2) * i, top + 16
            assert np.array_equal(sheet[:, below : below + side, left : left + side], image)
    assert (sheet[:, height + 14 :, 2 + 3 * (side + 2) :] == 255).all()


def test_curves_show_each_number_beside_that_of_held_out_images(tmp_path, monkeypatch):
    """Over steps, and logarithmic where all are above 0 and far apart."""
    names = "step mse val_mse d_real d_fake val_psnr".split()
    values = [(7 * j * j, 9.0**-j, 8.0**-j, j - 1.0, -1.0, 30.0 + j) for j in range(3)]
    log = [dict(zip(names, row)) for row in values]
    del log[1]["d_real"]
    saved = recorded(monkeypatch, vqldm.Figure, "savefig")
    ORIGINAL.draw_curves(tmp_path / "curves.png", log)
    panels = {"val_psnr": "linear", "val_mse mse": "log", "d_real d_fake": "linear"}
    for (panel, scale), ax in zip(panels.items(), saved[0].self.axes, strict=True):
        points = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
        assert ax.get_yscale() == scale and ax.get_legend()
        for name in panel.split():
            assert points.pop(name) == [[row["step"], row[name]] for row in log if name in row]
        assert not points


# ---- E. Muon -----------------------------------------------------------------------------------
def test_muon_keeps_the_means_directions_and_evens_out_strengths():
    """m <- .95 m + .05 g, and with .95 m + .05 g = U S Vᵀ a step is lr · U S' Vᵀ, where S' is S of
    length 1, five times through Jordan's polynomial, so near 1, though S spans a factor of 30."""
    for shape in ((1, 1, 1, 1), (1, 9, 1, 1), (9, 1, 1, 1), (64, 4, 2, 2)):
        p, mean = nn.Parameter(randn(*shape)), 0
        muon = vqldm.Muon([p], 0.1)
        for key in range(3):
            before = p.detach().flatten(1).clone()
            u, s, v = torch.linalg.svd(randn(*shape, key=key).flatten(1), full_matrices=False)
            p.grad = (u * torch.logspace(0, -1.5, len(s)) @ v).view(shape)
            mean = 0.95 * mean + 0.05 * p.grad
            muon.step()
            g = (0.95 * mean + 0.05 * p.grad).flatten(1)
            u, s, v = torch.linalg.svd(g, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            inner = u.T @ (before - p.detach().flatten(1)) @ v.T / 0.1
            assert torch.allclose(inner, s.diag(), atol=3e-3)
            assert 0.6 < s.min() and s.max() < 1.3


# ---- F. Commands -------------------------------------------------------------------------------
# command | mistakes, of which the first word, up to =, stands in the sentence
MISTAKES = """
train-vq | --epoch 3 & --batchsize=4 & 5 & --overwrite & --preset huge & --resume & --size
  & --size 1.5 & --size 8 --widths 8 & --size 16 & --size 40 & --size 48 --widths 8,8,8,8,8
  & --held-out .6 & --held-out -0.1 & --turns upright & --epochs 0 & --epochs nan & --widths 16,x
  & --widths 16,0 & --lr nan & --lr -1 & --batch-size -8 & --device cuda:77 & --device abacus
  & --lpips-weight x & --data= & --gan-weight & --data nowhere & --data empty & --data held
  & --data free & --out {vq} & --out free/a.bmp --data {photos} & --resume --out {vq} --codes 9
train-ldm --vq {vq} | --vq nowhere & --vq {ldm} & --widths 8,8,8,8 & --target x0 & --ema 7 & --T 0
  & --T 1 --schedule linear & --schedule quadratic & --guide told & --out {ldm} & --data split
  & --data few & --n-images 9
sample --ckpt {ldm} | --sampler dpm & --class wart & --autoguidance x & --steps 0 & --n 0
  & --ckpt {vq} & --ckpt empty & --ckpt ~no-such-user/x & --data photos & --out {vq}
evaluate --ckpt {ldm} | --ckpt nowhere & --ckpt {vq} & --n 0 & --n 1 & --data nowhere & --data empty
  & --data free & --class wart & --images empty & --resume"""


def test_every_mistake_is_one_sentence(calm, elsewhere, monkeypatch, refused):
    """And nothing is written, nor a run overwritten. Folders have no image, none to train on, too
    few to hold one out, or a class that is held out alone."""
    monkeypatch.setattr(vqldm, "synthetic", lambda *a: 1 / 0)  # or it takes long
    folders = {"empty": "", "free": "a.bmp", "held": "val/a.bmp", "few": "0.bmp 1.bmp"}
    folders["split"] = "a/0.bmp val/b/3.bmp"
    for name, names in folders.items():
        fill(Path(name), names)
    runs = {stage: calm.folder / "calm" / stage for stage in STAGES}
    before = {path: path.read_bytes() for run in runs.values() for path in run.iterdir()}
    for command, mistakes in cases(MISTAKES):
        for mistake in re.split(r"\s+& ", mistakes):
            words = f"{command} {mistake}".format(photos=calm.folder / "photos", **runs).split()
            words[1:1] = ["--out", "out"] if command[0] != "e" else []  # evaluate needs none
            told = refused(*words)
            assert re.split("[ =]", mistake)[0] in told, told
            assert {path.name for path in Path(".").iterdir()} <= {*folders, "cache"}, mistake
    assert before == {path: path.read_bytes() for run in runs.values() for path in run.iterdir()}


def test_help_shows_every_flag_with_its_own_meaning_and_default(monkeypatch, said):
    """Also on a console that lacks its letters, and each command is named if none is typed."""
    monkeypatch.setenv("COLUMNS", "300")
    own = {"train-vq": "widths.*16,32,64", "train-ldm": "widths.*UNet"}
    for command, words in {**own, "sample": "n .*all classes", "evaluate": "n .*unseen"}.items():
        assert cli(command, "--help") == 0
        shown = said()
        assert re.search(rf"^ +--{words}", shown, re.M)
        for field in fields(vqldm.COMMANDS[command][0]):
            flag, default = field.name.strip("_").replace("_", "-"), str(field.default)
            if command in ("sample", "evaluate") and field.name in vqldm.Sampling.__annotations__:
                default = "as trained"
            if isinstance(field.default, tuple):  # as it can be typed
                default = ",".join(map(str, field.default))
            line = rf"^ +--{flag}( [\w-]+| {{.*}})?\n? +\S.{{7,}} \[{re.escape(default)}\]$"
            assert re.search(line, shown, re.M), flag
    for words, told in (["train-vq", "--help"], "--codes"), ([], ", ".join(vqldm.COMMANDS)):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        monkeypatch.setattr(sys, "argv", ["vqldm.py", *words])
        with suppress(SystemExit):
            runpy.run_path(vqldm.__file__, run_name="__main__")
        sys.stdout.seek(0)
        assert told in sys.stdout.read()


@pytest.fixture()
def settings_of(monkeypatch):
    """A function that types a command, which does nothing -> the settings that it was given."""
    given = []
    for name, (cls, _) in [*vqldm.COMMANDS.items()]:
        monkeypatch.setitem(vqldm.COMMANDS, name, (cls, lambda cfg, *a: given.append(cfg)))

    def call(words):
        assert cli(*words.split()) == 0, words
        return given.pop()

    return call


# what is typed | some settings that the command then has
SETTLED = """
train-vq --out new | codes 2048 & epochs 3 & widths (16,~64) & resume False & data synthetic
train-vq --out new --preset tiny | codes 64 & epochs 4 & seed 0 & widths (16,~32)
train-vq --out new --codes 9 --preset tiny --seed 3 | codes 9 & epochs 4 & seed 3
train-vq --out new --preset report --device cpu | upsample transposed & codes 2048 & device cpu
train-ldm --out new --preset tiny | T 200 & steps 50 & unconditional False & codes missing
train-ldm --out new --preset report | unconditional True & target eps & sampler ddpm & steps 1000
train-vq --resume --out vq | codes 16 & epochs 3.0 & preset tiny & out vq & resume True
train-vq --resume --out vq --preset tiny --epochs 7 --codes 16 | codes 16 & epochs 7.0
train-ldm --resume --out ldm --steps 9 | steps 9 & T 3 & widths (8,) & autoguidance 1.5
sample --ckpt ldm --class é | steps 3 & class_ é & n 64 & sampler ddim & seed 0
sample --ckpt ldm/last.pt --steps 9 --seed 4 | steps 9 & seed 4 & class_guidance 1.5
evaluate --ckpt ldm --autoguidance 2 | autoguidance 2.0 & steps 3 & n 500 & data"""


def test_typed_beats_recorded_beats_preset_beats_default(copy_of, elsewhere, settings_of):
    """And each command looks where the one before it writes."""
    copy_of("ldm"), copy_of("vq", config=dict(preset="tiny"))
    for words, want in cases(SETTLED):
        cfg = settings_of(words)
        for one in want.split(" & "):
            name, value = [*one.split(), ""][:2]
            assert str(getattr(cfg, name, "missing")) == value.replace("~", " "), (words, one)
    assert vqldm.VQConfig().folder == Path(vqldm.LDMConfig().vq)
    assert vqldm.LDMConfig().folder == Path(vqldm.SampleConfig().ckpt)
    assert vqldm.SampleConfig().ckpt == vqldm.EvaluateConfig().ckpt


def test_quick_is_the_default_with_fewer_images_and_epochs(settings_of):
    few = {"train-vq": {"epochs", "n_images", "held_out"}, "train-ldm": {"epochs"}}
    for command, names in few.items():
        usual, quick = [vars(settings_of(f"{command} --out x {p}")) for p in ("", "--preset quick")]
        assert {name for name in usual if quick[name] != usual[name]} == {"preset", *names}
        assert all(quick[name] < usual[name] for name in names)


# ---- README and NOTES --------------------------------------------------------------------------
HERE = Path(vqldm.__file__).parent
PAGES = "README.md", "docs/NOTES.md", "vqldm.py"
README, NOTES, SOURCE = [(HERE / name).read_text(encoding="utf8") for name in PAGES]


def blocks(kind, text):
    """-> the blocks of code of this kind in a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def test_every_command_in_readme_and_notes_can_be_typed(elsewhere, monkeypatch, settings_of):
    """Without a comment, which zsh, the shell of a Mac, takes as an argument. And each flag and
    column that README names is one, and columns are in their order."""
    known = {"vq": {"settings": vqldm.VQConfig()}, "ldm": {"settings": vqldm.LDMConfig()}}
    monkeypatch.setattr(vqldm, "load_checkpoint", lambda where, flag, stage: known[stage])
    lines = "".join(blocks("sh", README + NOTES))
    assert "#" not in lines
    typed = re.findall(r"python3? +vqldm\.py +([^\n&]+)", lines)
    for words in typed:
        settings_of(words)
    assert [words.split()[0] for words in typed[:3]] == [*vqldm.COMMANDS][:3]
    flags = [vqldm.parser_of(name, cls).format_help() for name, (cls, _) in vqldm.COMMANDS.items()]
    flags = {
        *re.findall(r"--[\w-]+", "".join(flags)),
        "--index-url",
        "--nproc-per-node",
        "--install",
    }
    assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", README)} <= flags
    (table,) = re.findall(r"^\| column \|.*\n((?:\|.*\n)+)", README, re.M)
    rows = [re.findall("`(.*?)`", row.split("|")[1]) for row in table.splitlines()[1:]]
    for row, names in zip(rows, (vqldm.NAME, vqldm.CLASS, vqldm.GROUP), strict=True):
        assert row and row == [name for name in names if name in row]


def test_the_python_of_readme_and_docs_runs(copy_of, elsewhere, monkeypatch, said):
    """README's runs, or is of the program, and seeds nothing. Fewer letters are drawn."""
    copy_of("ldm", classes=["mole", "nevus-like"]).rename(fill(Path("runs")) / "ldm")
    (excerpt, example), there = blocks("python", README), {}
    code = [re.sub(" *#.*", "", text) for text in (excerpt, SOURCE)]
    assert re.sub("^\n+", "", code[0]) in re.sub("\n+", "\n", code[1])
    torch.manual_seed(7)
    exec(example, there)
    assert torch.initial_seed() == 7  # to load a model must not seed the caller's numbers
    assert there["images"].shape == there["recon"].shape == (4, 3, 32, 32)
    fill(Path("photos"))
    Path("labels.csv").write_text("image;MEL;NV;BCC\n0;0.0;1.0;0.0")
    folders, labels = blocks("python", NOTES)
    exec(folders.replace("300", "3"), there), exec(labels, {})
    for name in ("real", "recon", "samples"):
        assert len([*Path("folders", name).glob("*.png")]) == len(there[name]) == 3
    assert not torch.isin(there["images"].ids[there["unseen"], 0], there["seen"]).any()
    assert Path("photos/metadata.csv").read_text() == "class,image,MEL,NV,BCC\nNV,0,0.0,1.0,0.0\n"
    monkeypatch.setattr(vqldm, "features", lambda net, x: F.avg_pool2d(x.double(), 8).flatten(1))
    monkeypatch.setattr(sys, "argv", "useful.py runs/ldm 4 nevus-like".split())
    for name in ("letters", "useful"):
        path = HERE / f"docs/{name}.py"
        exec(path.read_text().replace("(512)", "(2)"), {"__file__": str(path)})
    assert "with samples balanced accuracy" in said()
    assert sorted(c for c, *_ in vqldm.find_images(Path("letters")).values()) == sorted(
        2 * "ABEFGKPR"
    )
