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


# ---- Helpers -----------------------------------------------------------------------------------
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
    """Each test runs plainly. One that asks for calm runs in its folder, and one that asks for runs
    in their precision."""
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


def beside(patch, *others):
    """As if a second process gave these tensors, one in each all_reduce."""
    others = iter(others)
    patch.setattr(vqldm, "TORCHRUN", True)
    patch.setattr(vqldm, "WORLD", 2)
    patch.setattr(vqldm.dist, "all_reduce", lambda x: x.add_(torch.tensor(next(others))))


# ---- 1. Blocks ---------------------------------------------------------------------------------
def test_blocks_start_as_nothing_and_norms_take_whole_images():
    """A ResBlock is its shortcut, an AttentionBlock the identity, and the UNet answers 0."""
    x, emb = randn(2, 8, 4, 4), randn(2, 16)
    alike, wider = vqldm.ResBlock(8, 8, 16), vqldm.ResBlock(8, 12)
    assert torch.equal(alike(x, emb), x)
    assert torch.equal(wider(x), wider.shortcut(x))
    assert torch.equal(vqldm.AttentionBlock(8)(x), x)
    assert not alike.emb(emb).any()  # emb neither scales nor shifts
    assert torch.allclose(vqldm.Norm(8)(x), F.layer_norm(x, x.shape[1:]), atol=1e-5)
    assert not vqldm.UNet(8, (8, 12), 1)(x, torch.tensor([0, 5])).any()


def test_networks_compute_in_bf16_where_that_is_fast(monkeypatch):
    """And answer in float32. The decoder's last layer stays in it, for lam."""
    x, z, t = randn(2, 3, 16, 16), randn(2, 4, 4, 4), torch.tensor([1, 2])
    for bf16 in (False, True):
        plainly(monkeypatch, bf16)
        inner = torch.bfloat16 if bf16 else torch.float32
        with vqldm.mixed_precision(x):
            assert torch.is_autocast_enabled("cpu") == bf16
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
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
    assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    for kind, gpu, fast in (("cuda", True, True), ("cuda", False, False), ("mps", True, False)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(return_value=gpu))
        assert vqldm.mixed_precision(Mock(device=Mock(type=kind))) == fast


def res(block, x, emb):
    """emb scales and shifts what the second norm puts out: AdaGN (Dhariwal & Nichol 2021)."""
    y = block.norm2(block.conv1(F.silu(block.norm1(x))))
    if emb is not None:
        scale, shift = block.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)
        y = y + scale * y + shift
    return block.shortcut(x) + block.conv2(F.silu(y))


def attention(block, x):
    """The softmax of queries times keys, over all positions."""
    y, own = block.norm(x).flatten(2).transpose(1, 2), block.attention  # (B,N,C)
    q, k, v = F.linear(y, own.in_proj_weight, own.in_proj_bias).chunk(3, 2)
    y = own.out_proj((q @ k.transpose(1, 2) / math.sqrt(x.shape[1])).softmax(2) @ v)
    return x + y.transpose(1, 2).view_as(x)


def doubled(layer, y):
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(y, layer.weight, layer.bias, stride=2, padding=1)
    return y.repeat_interleave(2, 2).repeat_interleave(2, 3)


def written_out(net, y, emb=None):
    """Down, middle, up, last, as VQGAN's Table 7 has them, from a network's layers. With emb:
    what each DownBlock has before it halves stands beside what the UpBlock of that size doubled."""
    skips, y = [], net.first(y)
    for block in getattr(net, "down", ()):
        skips.append(res(block.res2, res(block.res1, y, emb), emb))
        y = block.down(skips[-1])
    y = res(net.mid.res2, attention(net.mid.attention, res(net.mid.res1, y, emb)), emb)
    for block in getattr(net, "up", ()):
        y = doubled(block.up, y)
        if emb is not None:
            y = torch.cat([y, skips.pop()], 1)
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


def test_default_networks_have_568_246_and_2_725_763_weights():
    """What is written out takes each layer's kernel size as given. This does not. After a change
    of the networks, count anew, and correct README."""
    vqgan, unet = vqldm.VQGAN(vqldm.VQConfig()), vqldm.UNet(3, (64, 128), 4)
    assert sum(p.numel() for p in vqgan.parameters()) == 568_246
    assert sum(p.numel() for p in unet.parameters()) == 2_725_763


def test_nearest_code_is_that_of_a_float64_search():
    """And a code looked up lies channels first, as a Mac's GPU needs it, and is its own nearest."""
    book, z = rough(vqldm.Codebook(512, 4), 1), randn(4, 4, 16, 16, key=2)
    e, k = book.embedding.weight.detach(), book.nearest(z)
    distance = (flat(z.double())[:, None] - e.double()).square().sum(2)
    excess = distance.gather(1, k.flatten()[:, None])[:, 0] - distance.amin(1)
    assert excess.max() < 1e-5
    assert k.shape == (4, 16, 16)
    z_q = book.lookup(k)
    assert z_q.is_contiguous() and torch.equal(flat(z_q), e[k.flatten()])
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
    outputs, again = flat(z).double(), e[dead].double()
    far, chosen = torch.cdist(again / outputs.std(0), outputs / outputs.std(0)).min(1)
    assert far.max() < 0.1
    assert chosen.min() < 10 and chosen.max() > 61  # of 0…71
    assert len(again.unique(dim=0)) == len(again)
    book.restart_unused(randn(1, 4, 1, 1), rng(0))  # a single vector has no spread
    assert book.embedding.weight.isfinite().all()


# ---- 3. Stage 1: the losses --------------------------------------------------------------------
def test_discriminator_gives_a_logit_for_each_patch():
    """Convolutions that halve, Norm (not after the first), LeakyReLU, no sigmoid at the end. Its
    kernels see 18, 38 or 78 pixels (its norms see the whole image)."""
    for widths, channels, sees in (
        ((80, 8), [3, 40, 80, 1], 18),
        ((8, 8, 8), [3, 32, 64, 128, 1], 38),
        ((8, 8, 8, 8), [3, 32, 64, 128, 256, 1], 78),
    ):
        disc, x, f = rough(vqldm.PatchDiscriminator(widths)), randn(2, 3, 96, 96), 2 ** len(widths)
        weights, y = iter(disc.parameters()), x
        for c_in, c in itertools.pairwise(channels):
            weight, bias = next(weights), next(weights)
            last = c == 1
            assert weight.shape == ((1, c_in, 3, 3) if last else (c, c_in, 4, 4))
            y = F.conv2d(y, weight, bias, stride=1 if last else 2, padding=1)
            if c_in > 3 and not last:
                y = F.group_norm(y, vqldm.Norm(c).num_groups, next(weights), next(weights))
            y = y if last else F.leaky_relu(y, 0.2)
        assert not list(weights)  # none is left
        assert torch.allclose(disc(x), y, atol=1e-3 * float(y.detach().abs().max()))
        assert y.shape == (2, 1, 96 // f, 96 // f)
        assert y.abs().max() > 1
        disc.layers = nn.Sequential(*[m for m in disc.layers if not isinstance(m, nn.GroupNorm)])
        middle = disc(x.requires_grad_())[0, 0, 48 // f, 48 // f]
        seen = grads(middle, (x,))[0][0].any(0)  # (H,W)
        assert seen.any(0).sum() == seen.any(1).sum() == sees


def test_lpips_is_frozen_and_sees_images_from_minus_1_to_1(lpips, monkeypatch, said):
    """Where it cannot be loaded, it is left out, with a warning."""
    assert "Dropout" in repr(lpips) and not any(m.training for m in lpips.modules())
    assert not any(p.requires_grad for p in lpips.parameters())
    x, x_hat = randn(2, 2, 3, 64, 64).requires_grad_()
    assert not lpips(x, x).any()
    assert grads(lpips(x_hat, x).sum(), (x_hat,))[0].any()
    monkeypatch.setattr("lpips.LPIPS", Mock(side_effect=OSError("no internet")))
    assert ORIGINAL.load_lpips(torch.device("cpu")) is None
    assert re.search("WARNING LPIPS.*/checkpoints.*no internet", said())


# ---- 4. Settings -------------------------------------------------------------------------------
def test_a_folder_is_recorded_with_its_full_path(elsewhere, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(elsewhere))
    assert vqldm.source("new") == vqldm.source("~/new") == os.path.realpath("new")
    assert vqldm.source("synthetic") == "synthetic"
    for out, folder in (
        ("~/x", elsewhere / "x"),
        ("~no-such-user/x", Path("~no-such-user/x")),
        ("", Path("runs/vq")),
    ):
        assert vqldm.VQConfig(out=out).folder == folder


# ---- 5. Device and chance ----------------------------------------------------------------------
def test_device_auto_takes_the_gpu_if_there_is_one(monkeypatch, said):
    """meta stands in for a GPU that is not fast at bf16, as opposed to this processor."""
    fast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(vqldm, "mixed_precision", lambda x: fast)
    for there, taken, dtype in (("meta", "meta", "float32"), (None, "cpu", "bfloat16")):
        find = Mock(return_value=there)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", find)
        assert vqldm.pick_device("auto").type == taken
        find.assert_called_once_with(check_available=True)
        assert said() == f"device {taken} which multiplies in torch.{dtype}\n"


def test_random_numbers_follow_from_their_key_in_any_process():
    """Python's own hash would give others in each. If this number changes, so do all runs."""
    assert rng(0, "a").initial_seed() == 3057973756231466050


# ---- 6. What both trainings share --------------------------------------------------------------
def symmetries(x):
    """The eight of x (3,H,H), by NumPy."""
    return [np.rot90(y, k, (1, 2)) for y in (x, np.flip(x, 2)) for k in range(4)]


def test_augment_shows_an_image_in_the_squares_eight_symmetries():
    x, turns = randn(8, 3, 5, 5), torch.arange(8)
    for image, shown in zip(x.numpy(), vqldm.augment(x, turns).numpy()):
        assert sum(np.array_equal(shown, a) for a in symmetries(image)) == 1
    every = vqldm.augment(x[:1].expand(8, -1, -1, -1), turns)
    assert len(every.unique(dim=0)) == 8
    assert torch.equal(every[0], x[0])
    assert torch.equal(every[4], x[0].flip(2))


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
    held = torch.tensor([content(i) % 10 == 0 for i in range(cfg.n_images)])
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
    book, log = net.codebook, {}
    rates = rates_of_vqgan(net, cfg)
    rates_d = {adam(disc.parameters(), (0.5, 0.9)): cfg.d_lr}
    for i, rows, progress, factor in steps_of(cfg, train):
        if i % 50 == 0:
            restarts = int((book.wins == 0).sum())
            book.restart_unused(net.encoder(images[rows[:16]]), rng(cfg.seed, "restart", i))
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
            (of_rec,) = grads(rec, net.decoder.last.weight)
            (of_gan,) = grads(adversarial, net.decoder.last.weight)
            lam = (of_rec.norm() / (of_gan.norm() + 1e-4)).clamp(max=cfg.lam_max)
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
                log.update(lam=lam, d_loss=d_loss, d_real=real.mean(), d_fake=-adversarial)
    x = images[val]
    with torch.no_grad():
        k = book.nearest(net.encoder(x))
        x_hat = net.decoder(book.lookup(k)).clamp(-1, 1)
    mse, p = (x_hat - x).square().mean((1, 2, 3)), torch.bincount(k.flatten()) / k.numel()
    log.update(look_mse=mse.mean(), look_psnr=(10 * (4 / mse).log10()).mean())
    log.update(look_lpips=blurred(x_hat, x).mean(), codes=(p > 0).sum() / cfg.codes)
    log.update(entropy=-torch.special.xlogy(p, p).sum())
    return net, disc, restarts, {name: float(value.detach()) for name, value in log.items()}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "report"])
def runs(request, tmp_path_factory):
    """Both stages, trained by the program. float32: with Muon and v. D joins late, lest rounding
    decides near ties of codes. bfloat16: with Adam, ε and balance. report: the report's system."""
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    vq_cfg = vqldm.VQConfig(
        **dict(size=32, n_images=46, widths=(4, 8), codes=512, batch_size=4, epochs=10),
        **dict(lpips_weight=0.5, gan_start=0.75, gan_weight=0.4, seed=6),
        **dict(lr=5e-4, muon_lr=0.005, codes_lr=0.005, d_lr=2e-3, out=str(folder / "vq")),
    )
    cfg = vqldm.LDMConfig(
        **dict(T=40, widths=(8, 12), ema=0.6, lr=1e-2, batch_size=2, steps=9, epochs=2, seed=5),
        **dict(vq=vq_cfg.out, out=str(folder / "ldm")),
    )
    if kind == "bfloat16":
        vq_cfg = vqldm.replace(vq_cfg, epochs=2, gan_start=0.3, muon_lr=0.0, codes_lr=0.05)
        cfg = vqldm.replace(cfg, epochs=1, target="eps", schedule="linear", balance=True)
    if kind == "report":
        preset = vqldm.PRESETS["report"]
        vq_cfg = vqldm.replace(vq_cfg, **{**preset["vq"], "epochs": 5, "batch_size": 20})
        cfg = vqldm.replace(cfg, **{**preset["ldm"], "epochs": 1, "steps": 40})
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch, bf16=kind == "bfloat16")
        patch.setattr(vqldm, "load_lpips", lambda device: blurred)
        losses = recorded(patch, Diffusion, "loss")
        vqldm.train_vq(vq_cfg, torch.device("cpu"))
        vqldm.train_ldm(cfg, torch.device("cpu"))
    vq = vqldm.load_checkpoint(vq_cfg.out, "", "vq")
    ldm = vqldm.load_checkpoint(cfg.out, "", "ldm")
    model = vqldm.restore_ldm(ldm, torch.device("cpu"))
    held = losses[-1].result  # the last look's, of each held-out image
    return SimpleNamespace(**locals(), bf16=kind == "bfloat16")


def assert_same(state, net):
    """Or tell which are farthest off, in units of what is allowed."""
    off = {
        name: float(((state[name] - p).abs() / (1e-4 + 1e-3 * p.abs())).max().detach())
        for name, p in net.named_parameters()
    }
    assert max(off.values()) <= 1, sorted(off.items(), key=lambda row: -row[1])[:3]


NEAR_TIES = "A few other codes are near ties, which rounding decides. Then try another seed"


def test_reference_stage_1_ends_with_the_papers_weights_and_log(runs):
    """With one rate, row, turn, loss, weight or restart wrong, weights differ."""
    net, disc, restarts, log = plain_vq(runs.vq_cfg)
    wins, want = runs.vq["model"]["codebook.wins"], net.codebook.wins
    other = float((wins - want).abs().sum() / 2 / want.sum())
    assert other < 0.01, NEAR_TIES
    assert_same(runs.vq["model"], net)
    assert_same(runs.vq["disc"], disc)
    assert all(p.grad.any() for p in net.parameters())  # so each weight is compared in full
    assert 0 < restarts < 512 if runs.kind == "float32" else restarts == 512
    rows = runs.vq["log"]
    logged = {**[row for row in rows if "mse" in row][-1], **rows[-1]}
    assert logged["look_codes_used_percent"] == pytest.approx(100 * log.pop("codes"), rel=0.02)
    assert logged["look_perplexity"] == pytest.approx(math.exp(log.pop("entropy")), rel=0.02)
    assert {name: logged[name] for name in log} == pytest.approx(log, rel=1e-3)


# ---- 8. Stage 2: diffusion ---------------------------------------------------------------------
def test_alpha_bar_is_the_product_and_ends_near_0():
    """For every T, with one rounding, from float64, as its only error. Level -1 has no noise."""
    for T in (50, 250, 1000):
        linear = np.linspace(1e-4, 0.02, T) * 1000 / T
        root = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2)
        for schedule, beta in (("linear", linear), ("cosine", 1 - (root[1:] / root[:-1]) ** 2)):
            alpha_bar = Diffusion(T, schedule).alpha_bar
            want = np.cumprod(1 - beta.clip(max=0.999))
            np.testing.assert_allclose(alpha_bar.double(), [*want, 1], rtol=1.2e-7)
            assert alpha_bar[-2] < 0.01
            assert (alpha_bar[:-1].diff() < 0).all()
    with pytest.raises(vqldm.UserError, match="--T"):
        Diffusion(1, "linear")


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


# ---- 10. From noise to images ------------------------------------------------------------------
WAYS = {
    "ddim": dict(steps=7, sampler="ddim", guidance=3.0, class_guidance=0.5),
    "ddpm": dict(steps=7, sampler="ddpm", guidance=1.0, class_guidance=2.5),
}


def plain_sample(runs, cfg, label, gens):
    """ddim: eq. 12, σ = 0. ddpm: the mean of q(z_prev | z_t, z0), DDPM eq. 7, and σ² = β."""

    def noise():
        return torch.stack([torch.randn(3, 8, 8, generator=gen) for gen in gens])

    n_classes = len(runs.ldm["classes"])
    strong, young = [vqldm.UNet(3, runs.cfg.widths, n_classes, runs.cfg.upsample) for _ in range(2)]
    strong.load_state_dict(runs.ldm["ema"])
    young.load_state_dict(runs.ldm["young"])
    untold = torch.full_like(label, n_classes)
    z = noise()
    for t, prev in runs.model.diffusion.pairs(cfg.steps):
        a, p = runs.model.diffusion.alpha_bar[[t, prev]]
        t_all = torch.full((len(z),), t)
        with torch.no_grad():
            good, weak = strong(z, t_all, label), young(z, t_all, label)
            vague = strong(z, t_all, untold)
        out = good + (cfg.guidance - 1) * (good - weak) + (cfg.class_guidance - 1) * (good - vague)
        eps = out if runs.cfg.target == "eps" else (1 - a).sqrt() * z + a.sqrt() * out
        z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        if cfg.sampler == "ddim":
            z = p.sqrt() * z0 + (1 - p).sqrt() * eps
        else:
            z = (p.sqrt() * (1 - a / p) * z0 + (a / p).sqrt() * (1 - p) * z) / (1 - a)
            z = z + (1 - a / p).sqrt() * noise() if prev >= 0 else z
    return z


@pytest.mark.parametrize("way", ["ddim", "ddpm", "recorded"])
def test_reference_sampling_ends_with_the_papers_latents(runs, way):
    """Of the running mean, led away from its younger self, and from itself untold the class. Each
    image has noise of its own, in whatever batch it is. recorded: as the training says, so the
    report's in all T steps and unguided."""
    how = WAYS.get(way) or {name: runs.ldm["config"][name] for name in WAYS["ddim"]}
    cfg = vqldm.SampleConfig(**how, seed=8)
    ids = torch.arange(0, 7 * 36, 7)  # as torch's integers, which are the same as Python's
    label = torch.tensor([2, 0, 1]).repeat(12) % len(runs.ldm["classes"])
    _, latents = runs.model.make(cfg, ids, label)  # in batches of 32 and 4

    some = [33, 4, 9]
    gens = [rng(8, "sample", 7 * i) for i in some]
    z = plain_sample(runs, cfg, label[some], gens)
    off = 2e-3 if runs.bf16 else 1e-4  # there batches of another size round apart
    assert torch.allclose(latents[some], z, rtol=off, atol=off * float(z.std()))


def test_a_strength_of_1_does_nothing_and_costs_no_call():
    strong, weak = [Mock(return_value=torch.tensor(x)) for x in (5.0, 3.0)]
    assert vqldm.guided(strong, (weak, 1), (weak, 1.0))("z", "t") == 5 and not weak.called
    assert vqldm.guided(strong, (weak, 1.5))("z", "t") == 5 + 0.5 * 2
    weak.assert_called_once_with("z", "t")


def test_latents_are_decoded_by_their_nearest_codes(runs):
    model = runs.model
    pictures, z0 = model.make(vqldm.SampleConfig(steps=2), range(4), torch.zeros(4).long())
    mean, std = runs.ldm["scale"].view(2, 3, 1, 1)
    with torch.no_grad():
        k = model.vqgan.codebook.nearest(z0 * std + mean)
        x = model.vqgan.decoder(model.vqgan.codebook.lookup(k))
    assert torch.equal(pictures, ((x.clamp(-1, 1) + 1) * 127.5).round().byte())
    assert torch.equal(pictures, model.decode(z0))


# ---- 11. Stage 2: training ---------------------------------------------------------------------
def plain_codes(vq_cfg, vqgan):
    """-> code numbers (n,8,h,w) of all images in all eight symmetries."""
    images, k = drawn(vq_cfg)[0], []
    for turn in range(8):
        turned = vqldm.augment(images, [turn] * len(images))
        with torch.no_grad():
            k.append(vqgan.codebook.nearest(vqgan.encoder(turned)))
    return torch.stack(k, 1)


def losses_of(cfg, net, z0, t, eps, label):
    """The squared error of each image's v or ε (B,)."""
    a = Diffusion(cfg.T, cfg.schedule).alpha_bar[t].view(-1, 1, 1, 1)
    goal = a.sqrt() * eps - (1 - a).sqrt() * z0 if cfg.target == "v" else eps
    out = net(a.sqrt() * z0 + (1 - a).sqrt() * eps, t, label)
    return (out - goal).square().flatten(1).mean(1)


def plain_ldm(cfg, vq_cfg, vqgan, scale):
    """Stage 2 -> UNet, its mean, the mean's younger self, held-out losses of UNet and mean, and
    the loss that the log should tell last."""
    _, train, val = drawn(vq_cfg)
    seed, B = cfg.seed, cfg.batch_size
    codes = vqgan.codebook.embedding.weight[plain_codes(vq_cfg, vqgan)]
    latents = ((codes - scale[0]) / scale[1]).movedim(-1, 2).detach()  # (n,8,d,h,w)
    n_classes = 1 if cfg.unconditional else 4
    labels = torch.arange(len(latents)) % n_classes
    torch.manual_seed(seed)
    net = vqldm.UNet(vq_cfg.z_dim, cfg.widths, n_classes, cfg.upsample)
    net.to(memory_format=torch.channels_last)
    ema, young, rates = copy.deepcopy(net), None, {adam(net.parameters()): cfg.lr}
    alpha_bar = Diffusion(cfg.T, cfg.schedule).alpha_bar
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
            a = alpha_bar[t]
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
    on held-out images the mean's. latent_std is of 16 samples in at most 25 steps."""
    net, ema, young, raw, held, loss = plain_ldm(
        runs.cfg, runs.vq_cfg, runs.model.vqgan, runs.ldm["scale"]
    )
    for part, want in (("model", net), ("ema", ema), ("young", young)):
        assert_same(runs.ldm[part], want)
    assert all(p.grad.any() for p in net.parameters())
    rows = runs.ldm["log"]
    assert [row["loss"] for row in rows if "loss" in row][-1] == pytest.approx(loss, 1e-3)
    assert rows[-1]["look_loss"] == pytest.approx(float(held.mean()), rel=2e-4)
    assert torch.allclose(runs.held, held, rtol=1e-3)
    assert not torch.allclose(runs.held, raw, rtol=1e-3)
    quick = vqldm.replace(runs.cfg, sampler="ddim", steps=min(runs.cfg.steps, 25))
    _, z0 = runs.model.make(quick, range(16), torch.arange(16) % len(runs.model.classes))
    assert rows[-1]["look_latent_std"] == pytest.approx(float(z0.std()), rel=1e-3)


def test_latents_are_the_codes_scaled_by_those_trained_on(runs):
    """In all symmetries, each channel by its own mean and std."""
    images, train, _ = drawn(runs.vq_cfg)
    vqgan, pixels = runs.model.vqgan, vqldm.to_bytes(images)
    k = vqldm.encode_images(vqgan, pixels, range(8)).long()
    other = (k != plain_codes(runs.vq_cfg, vqgan)).float().mean()
    assert other < 0.01, NEAR_TIES
    codes = vqgan.codebook.embedding.weight[k].double()  # (n,8,h,w,d)
    of_train = codes[train].flatten(0, -2)
    mean, std = of_train.mean(0), of_train.std(0, correction=0)
    assert torch.allclose(runs.ldm["scale"].double(), torch.stack([mean, std]), rtol=1e-5)
    rows, turns = torch.tensor([3, 7, 7]), torch.tensor([0, 0, 5])
    z0 = ((codes[rows, turns] - mean) / std).movedim(-1, 1)
    assert torch.allclose(runs.model.to_latents(k[rows, turns]).double(), z0, atol=1e-4)


def test_both_stages_use_the_turns_that_are_allowed(calm, tmp_path, monkeypatch):
    """Stage 1 draws them, and stage 2 encodes them, in fewer the more images there are. (All eight
    turns are in the references.)"""
    drawn, encode = recorded(monkeypatch, vqldm, "augment"), Mock(side_effect=ZeroDivisionError)
    for turns, want in (("mirror", {0, 4}), ("none", {0})):
        drawn.clear()
        train("vq", tmp_path / turns, "--turns", turns, "--epochs", 1)
        assert {int(turn) for call in drawn for turn in call.turns} == want
    monkeypatch.setattr(vqldm, "encode_images", encode)
    encoded = {(tmp_path / "mirror", 99): (0, 4), (tmp_path / "none", 99): (0,)}
    encoded |= {("calm/vq", 2500): range(8), ("calm/vq", 5000): range(4), ("calm/vq", 20_001): (0,)}
    for (vq, n), want in encoded.items():
        pixels, i = torch.zeros(1, 3, 32, 32).byte(), torch.arange(n)
        pixels, ids = pixels.expand(n, -1, -1, -1), i[:, None].expand(n, 2)
        images = vqldm.Images(pixels, i % 2, ["a", "b"], ids, i == 0)
        monkeypatch.setattr(vqldm, "read_images", lambda *a, images=images: images)
        with pytest.raises(ZeroDivisionError):
            train("ldm", tmp_path / "ldm", "--vq", vq)
        assert [*encode.call_args[0][2]] == [*want]


def test_looks_measure_and_draw_the_same_images_each_time(calm):
    """Under their step, with less error at the end."""
    for stage, score, name in (("vq", "mse", "recon"), ("ldm", "loss", "samples")):
        log = state_of(f"calm/{stage}/last.pt")["log"]
        looks = [row for row in log if "look_" + score in row]
        drawn = [call for call in calm.drawn if call.path.parent.name == stage]
        names = [f"{name}_step_{row['step']:06}.png" for row in looks]
        assert [call.path.name for call in drawn] == names and len(names) == 10
        assert looks[-1]["look_" + score] < looks[0]["look_" + score]
        columns = zip(*[bytes_of(call.rows.values()) for call in drawn])
        *originals, made = [len({*column}) for column in columns]
        assert originals == [1] * (stage == "vq") and made > 5
        if stage == "vq":  # of 18 images, which are several parts
            x, x_hat = map(vqldm.to_float, drawn[-1].rows.values())
            assert len(x) == 18 and F.mse_loss(x_hat, x) == pytest.approx(
                looks[-1]["look_mse"], 0.01
            )


# ---- 12. Sampling and measuring ----------------------------------------------------------------
def test_sample_writes_a_folder_that_can_be_read(
    copy_of, elsewhere, load, monkeypatch, said, refused
):
    """All classes in turn, in lots of 64, or one, made as it was recorded, or as is typed. It ends
    at its first image if the disk is full."""
    names = ["$mole, new", "É"]
    ldm = copy_of("ldm", config=dict(sampler="ddpm", guidance=1.7), classes=names)
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "make")
    typed = "--sampler ddim --steps 2 --guidance 4 --class é --n 5 --out one/class"
    for words, way, want in (
        ("--n 70 --out all", ("ddpm", 3, 1.7), 35 * [0, 1]),
        (typed, ("ddim", 2, 4), 5 * [1]),
    ):
        made.clear(), drawn.clear()
        assert cli("sample", "--ckpt", ldm, *words.split()) == 0
        out, images = Path(words.split()[-1]), torch.cat([call.result[0] for call in made])
        for how in [call.settings for call in made]:
            assert (how.sampler, how.steps, how.guidance) == way
        assert [int(i) for call in made for i in call.ids] == [*range(len(want))]
        assert [k for call in made for k in call.label.tolist()] == want
        again = load(out, size=32)  # files by name, so by number, and classes by metadata.csv
        assert torch.equal(again.pixels[:], images)
        assert classes_of(again) == [names[k] for k in want]
        grid = {names[k]: images[:64][torch.tensor(want[:64]) == k] for k in sorted({*want})}
        assert drawn[0].path == out / "grid.png" and same(drawn[0].rows, grid)
        assert f"std is {made[0].result[1].std():.2f}, healthy" in said()
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space" in refused("sample", "--ckpt", ldm, "--n", 3, "--out", "new")
    assert full.call_count == 1


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
    """By the distance of 32×32 means: against a float64 search."""
    pixels = torch.randint(256, (300, 3, 64, 64), generator=rng(1)).byte()
    turned = vqldm.augment(pixels[290:298], torch.arange(8))
    pictures = torch.cat([pixels[:1], turned] * 30)  # several parts
    distance, row = vqldm.nearest_trained(pictures, pixels[1:])
    small = pixels.double().unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5)) / 127.5 - 1
    small = small.numpy()
    best = min(
        (np.linalg.norm(small[0] - shown), i)
        for i in range(1, 300)
        for shown in symmetries(small[i])
    )
    assert (row + 1).tolist() == [best[1], *range(290, 298)] * 30
    assert abs(distance[0] / best[0] - 1) < 1e-4
    assert distance[1:9].max() < 0.1


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
    return SimpleNamespace(
        trained=trained, are_green=lambda images: (images[:, 1, 20, 20] > 130).tolist()
    )


def test_evaluate_measures_what_no_training_has_seen(hospital, lpips, monkeypatch, said):
    """kernel: samples. perfect: other images through stage 1. recon: these, real: other images. A
    near copy is nearer to a training image than half the median of unseen ones. Three of the nine
    samples are, and the one that was saved again."""
    make = vqldm.LatentDiffusion.make

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
    numbers = json.loads(Path("o/e/metrics.json").read_text())
    # two halves of the twelve, in a mixture, and samples of the classes of the first, as recorded
    (samples, z0), (real, other) = made[0].result, [call.pixels for call in reconstruct]
    recon, perfect = [call.result[1] for call in reconstruct]
    assert len(real) == len(other) == numbers["unseen_images"] == 6
    assert len({*bytes_of(real), *bytes_of(other)}) == 12
    green = hospital.are_green(real)
    assert {*green} == {True, False} and sum(green + hospital.are_green(other)) == 6
    assert made[0].label.tolist() == [int(green[i % 6]) for i in range(9)]
    assert made[0].settings.steps == 3
    # each distance is to the set that it names
    found = {call.pixels.numpy().tobytes(): call.result for call in features}
    sets = dict(kernel=samples[:6], kernel_perfect=perfect, kernel_recon=recon, kernel_real=other)
    for name, images in sets.items():
        a, b = [found[one.numpy().tobytes()] for one in (real, images)]
        assert numbers[name] == pytest.approx(vqldm.kernel_distance(a, b), rel=1e-3)
    # near copies
    (distance, row), (usual, _) = [call.result for call in nearest]
    assert torch.equal(nearest[0].pictures, samples)
    assert {*bytes_of(nearest[1].pictures)} == {*bytes_of(real), *bytes_of(other)}
    assert {*bytes_of(nearest[0].trained)} == {*bytes_of(hospital.trained)}
    assert (distance < sorted(usual.tolist())[5] / 2).tolist() == [4 <= i < 7 for i in range(9)]
    want = dict(near_copies=3, near_copies_percent=100 / 3, near_copies_unseen=1, step=12)
    want |= dict(near_copies_unseen_percent=100 / 12, training_images_found=36)
    want |= dict(latent_std=float(z0.std()), mse=reconstruct[0].result[0]["mse"])
    want |= dict(ckpt="ldm", data=os.path.abspath("all"), n=9, steps=3, guidance=1.5, class_="")
    assert {name: numbers[name] for name in want} == pytest.approx(want)
    # pictures, the worst sample first, and where all that is
    order = distance.argsort()
    want = real, recon, samples, samples[order], nearest[0].trained[row[order]]
    assert all(map(torch.equal, drawn[0].rows.values(), want))
    assert "look at o/e/evaluate.png and metrics.json\n" in said().replace(os.sep, "/")
    assert Path("o/cache").is_dir()


def test_evaluate_measures_one_class_or_all_images_as_one(hospital, monkeypatch):
    """The same images at any seed. Without LPIPS there are no kernels, without training images no
    near copies."""
    shutil.rmtree("all/train")
    Path("all/metadata.csv").unlink()
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "make")
    for seed in (0, 7):
        words = f"evaluate --ckpt ldm --data all --class SCAR --n 4 --seed {seed}"
        assert cli(*words.split()) == 0
        assert all(hospital.are_green(calls[-1].pixels)) and made[-1].label.tolist() == [1] * 4
        assert torch.equal(calls[-1].pixels, calls[0].pixels) and len(calls[-1].pixels) == 3
    numbers = json.loads(Path("ldm/metrics.json").read_text())
    assert numbers["class_"] == "SCAR" and numbers["training_images_found"] == 0
    assert not [name for name in numbers if "kernel" in name or "near" in name]
    state = state_of("ldm/last.pt")
    state["config"]["unconditional"], state["classes"] = True, ["images"]
    for part in ("ema", "young"):
        state[part]["label.weight"] = state[part]["label.weight"][:2]
    torch.save(state, "ldm/last.pt")
    assert cli(*"evaluate --ckpt ldm --data all --n 20".split()) == 0
    assert len(calls[-1].pixels) == 8 and made[-1].label.tolist() == [0] * 20


# ---- A. Drawn lesions --------------------------------------------------------------------------
def test_drawn_images_follow_from_seed_and_number_alone(load, monkeypatch):
    """In whatever order they are drawn, and kept by seed on disk, also for the run that made them.
    No two are alike. Another processor may round pixels otherwise, so number and seed mark them."""

    def draw(n, seed):
        return load("synthetic", size=24, n_images=n, seed=seed)

    maps, here, zero = recorded(monkeypatch, torch, "load"), draw(8, 1), draw(9, 0)
    assert here.pixels is maps[0].result["pixels"]
    for i in range(7, -1, -1):
        assert torch.equal(here.pixels[i], vqldm.synthetic(i, 24, 1))
    assert len(torch.cat([here.pixels, zero.pixels]).unique(dim=0)) == 17
    assert torch.equal(draw(8, 0).pixels[:], zero.pixels[:8])
    monkeypatch.setattr(vqldm, "decode_images", Mock(side_effect=ZeroDivisionError))
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


# ---- D. Pictures -------------------------------------------------------------------------------
def test_rows_of_pictures_are_drawn_under_their_names(tmp_path):
    """At most 16 of each, two pixels apart, 14 for a name, and an empty row is left out."""
    images = torch.randint(256, (20, 3, 8, 8), generator=rng("rows")).byte()
    path, rows = tmp_path / "new/grid.png", {"many": images, "none": images[:0], "p": images[:3]}
    ORIGINAL.draw_rows(path, rows)
    sheet = np.moveaxis(np.array(Image.open(path)), 2, 0)
    assert sheet.shape == (3, 2 * 26, 162)
    for top, few in ((0, images[:16]), (26, images[:3])):
        assert sheet[:, top : top + 13].min() < 128  # a name
        for i, image in enumerate(few):
            left = 2 + 10 * i
            assert np.array_equal(sheet[:, top + 16 : top + 24, left : left + 8], image)
    assert (sheet[:, 40:, 32:] == 255).all()


def test_curves_show_each_number_beside_that_of_held_out_images(tmp_path, monkeypatch):
    """Over steps, and logarithmic where all are above 0 and far apart."""
    names = "step mse look_mse d_real d_fake look_psnr".split()
    values = [(7 * j * j, 9.0**-j, 8.0**-j, j - 1.0, -1.0, 30.0 + j) for j in range(3)]
    log = [dict(zip(names, row)) for row in values]
    del log[1]["d_real"]
    saved = recorded(monkeypatch, vqldm.Figure, "savefig")
    ORIGINAL.draw_curves(tmp_path / "curves.png", log)
    panels = {"mse look_mse": "log", "look_psnr": "linear", "d_real d_fake": "linear"}
    for (panel, scale), ax in zip(panels.items(), saved[0].self.axes, strict=True):
        points = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
        assert ax.get_yscale() == scale and ax.get_legend()
        assert points == {
            name: [[row["step"], row[name]] for row in log if name in row] for name in panel.split()
        }


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
            u, s, v = torch.linalg.svd(
                (0.95 * mean + 0.05 * p.grad).flatten(1), full_matrices=False
            )
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            inner = u.T @ (before - p.detach().flatten(1)) @ v.T / 0.1
            assert torch.allclose(inner, s.diag(), atol=3e-3)
            assert 0.6 < s.min() and s.max() < 1.3
