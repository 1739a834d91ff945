# SPDX-License-Identifier: MIT
"""What vqldm.py promises, as tests. Each name, with its docstring, is the sentence that it proves.

The strongest laws have an oracle: where the data is a known mixture of Gaussians, the best possible
network is a formula. Stronger still are the references: both trainings, written out once more as
plainly as possible; the program must end with the same weights. No network, no GPU.
"""
import copy, functools, itertools, json, math, os, re, shutil, signal, subprocess, sys, types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock
import numpy as np
import pytest, torch, vqldm
import torch.nn.functional as F
from PIL import Image
from torch import nn
from vqldm import Diffusion, UserError, rng

torch.set_num_threads(1)        # these tensors are small: more threads only wait for each other

def randn(*shape, key=0):
    """Normal numbers that are the same in each run, whatever ran before."""
    return torch.randn(shape, generator=rng("test", key))

def grads(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)
def flat(z):                    # (B,d,h,w) -> (B·h·w,d)
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)
def bf16(on=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)
def rough(net, std=0.3):
    """The network with no weight left at zero, so that everything in it is heard."""
    for i, p in enumerate(net.parameters()):
        p.data = std * randn(*p.shape, key=("rough", i))
    return net

# ---- 2, 3. Seeds, rows, symmetries -------------------------------------------------------------
def test_augment_shows_each_image_in_the_eight_symmetries_of_the_square():
    x = randn(3, 3, 5, 5)
    want = [[np.rot90(b, k, (1, 2)) for b in (a, np.flip(a, 2)) for k in range(4)]
            for a in x.numpy()]
    for turns in itertools.islice(itertools.product(range(8), repeat=3), 0, None, 7):
        for image, group in zip(vqldm.augment(x, torch.tensor(turns)).numpy(), want):
            assert sum(np.array_equal(image, a) for a in group) == 1
    every = vqldm.augment(x[:1].expand(8, -1, -1, -1), torch.arange(8))
    assert len(every.unique(dim=0)) == 8 and torch.equal(every[0], x[0])

# ---- 4. Blocks ---------------------------------------------------------------------------------
@pytest.mark.parametrize("c", [1, 2, 3, 7, 8, 12, 30, 64, 100, 256])
def test_norm_works_for_every_width_and_treats_each_image_alone(c):
    norm, x = vqldm.Norm(c), 5 + 3 * randn(3, c, 6, 6)
    y = norm(x)
    groups = y.unflatten(1, (norm.num_groups, -1)).flatten(2)
    assert groups.mean(2).abs().max() < 1e-4 and c // norm.num_groups >= min(4, c)
    assert norm.num_groups <= 32 and (groups.var(2, correction=0) - 1).abs().max() < 1e-3
    assert torch.allclose(y[:1], norm(x[:1]), atol=1e-5)

def test_residual_branches_start_as_nothing():
    """A ResBlock is its shortcut, an AttentionBlock the identity, and the UNet answers 0."""
    x, emb, wider = randn(2, 8, 4, 4), randn(2, 16), vqldm.ResBlock(8, 12)
    assert torch.equal(vqldm.ResBlock(8, 8, 16)(x, emb), x)
    assert torch.equal(wider(x), wider.shortcut(x)) and torch.equal(vqldm.AttentionBlock(8)(x), x)
    assert not vqldm.UNet(8, (8, 12), 1)(x, torch.tensor([0, 5])).any()

def res(block, x, emb):
    """emb scales and shifts what the second norm puts out: AdaGN (Dhariwal & Nichol 2021)."""
    y = block.norm2(block.conv1(F.silu(block.norm1(x))))
    if emb is not None:
        scale, shift = block.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)
        y = y + scale * y + shift
    return block.shortcut(x) + block.conv2(F.silu(y))

def attention(block, x):
    """Softmax of queries times keys, over all positions."""
    y, own = block.norm(x).flatten(2).transpose(1, 2), block.attention                  # (B,N,C)
    q, k, v = F.linear(y, own.in_proj_weight, own.in_proj_bias).chunk(3, 2)
    y = own.out_proj((q @ k.transpose(1, 2) / math.sqrt(x.shape[1])).softmax(2) @ v)
    return x + y.transpose(1, 2).view_as(x)

def written_out(net, y, emb=None):
    """Down, middle, up, last, as VQGAN's Table 7 has them, from a network's layers. With emb:
    what each DownBlock has before it halves stands beside what the UpBlock of that size doubled."""
    skips, y = [], net.first(y)
    for block in getattr(net, "down", ()):
        skips.append(res(block.res2, res(block.res1, y, emb), emb))
        y = block.down(skips[-1])
    y = res(net.mid.res2, attention(net.mid.attention, res(net.mid.res1, y, emb)), emb)
    for block in getattr(net, "up", ()):
        if isinstance(block.up, nn.ConvTranspose2d):
            y = F.conv_transpose2d(y, block.up.weight, block.up.bias, stride=2, padding=1)
        else:
            y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        y = y if emb is None else torch.cat([y, skips.pop()], 1)
        y = res(block.res2, res(block.res1, y, emb), emb)
    return net.last(F.silu(net.norm(y)))

@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
def test_encoder_and_decoder_are_the_blocks_of_the_paper_written_out(upsample):
    net, x, z = rough(vqldm.VQGAN((8, 12), 3, 5, upsample)), randn(2, 3, 16, 16), randn(2, 3, 4, 4)
    for part, y, size in ((net.encoder, x, 4), (net.decoder, z, 16)):
        assert torch.allclose(part(y), written_out(part, y), atol=1e-3)
        assert part(y).shape == (2, 3, size, size)

# ---- 5. The codebook ---------------------------------------------------------------------------
def codebook(K=32, d=4):
    book = vqldm.Codebook(K, d)
    book.embedding.weight.data = randn(K, d, key="codes")
    return book, randn(2, d, 6, 6, key="z").requires_grad_(), book.embedding.weight

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_code_is_that_of_a_float64_search(dtype):
    """Also for bf16 latents under autocast, where distances in bf16 choose 5-15 % wrongly."""
    book, *_, e = codebook(512)
    z = randn(4, 4, 16, 16, key=2).to(dtype)
    with bf16(dtype == torch.bfloat16):
        k, inside = book.nearest(z), book(z)[1]
    d = (flat(z.double())[:, None] - e.detach().double()).square().sum(2)
    excess = d.gather(1, k.flatten()[:, None])[:, 0] - d.amin(1)
    assert torch.equal(k, inside) and k.shape == (4, 16, 16) and excess.max() < 1e-5

def test_codes_start_again_on_encoder_outputs_and_only_those_that_shall(monkeypatch):
    book, z, e = codebook(64)
    before, dead = e.detach().clone(), torch.arange(64) % 3 == 0
    book.wins[~dead] = 1
    book.restart_unused(100 + z, rng(0))
    far = torch.cdist(e[dead].detach(), flat(100 + z)).amin(1)
    place = torch.cdist(e[dead].detach(), flat(100 + z)).argmin(1)      # of 0…71: drawn from all
    assert place.min() < 10 and place.max() > 61
    assert torch.equal(e[~dead], before[~dead]) and far.max() < 0.1 * flat(z).std(0).norm()
    assert len(e[dead].unique(dim=0)) == dead.sum() and not book.wins.any()     # no two alike
    book.restart_unused(z[:1, :, :1, :1], rng(0))
    assert e.isfinite().all()                               # a single vector has no spread
    monkeypatch.setattr(vqldm, "world", lambda: 2)          # all processes take the first's
    monkeypatch.setattr("torch.distributed.broadcast", lambda codes, source: codes.fill_(source))
    book.restart_unused(z, rng(0))
    assert not e.any()

# ---- 6. The losses of stage 1 ------------------------------------------------------------------
def test_discriminator_is_convolutions_with_norm_and_leaky_relu_and_gives_raw_logits():
    """Between the first and the last: conv, Norm, LeakyReLU. No sigmoid, no tanh at the end."""
    disc, x = rough(vqldm.PatchDiscriminator((8, 8, 8))), randn(2, 3, 32, 32)
    convs, norms = [[m for m in disc.modules() if isinstance(m, kind)]
                    for kind in (nn.Conv2d, vqldm.Norm)]
    y = F.leaky_relu(convs[0](x), 0.2)
    for conv, norm in zip(convs[1:-1], norms, strict=True):
        y = F.leaky_relu(norm(conv(y)), 0.2)
    assert torch.allclose(disc(x), convs[-1](y), atol=1e-4) and disc(x).abs().max() > 1

@pytest.mark.parametrize("rec, fool, most", [(3, 2, 1e4), (3, 1e-4, 1e4), (9, 0, 1e4), (3, 2, 1)])
def test_lam_is_the_ratio_of_both_pushes_on_the_last_layer_up_to_its_limit(rec, fool, most):
    last = torch.ones(4, requires_grad=True)
    lam = vqldm.adaptive_weight((rec * last).sum(), (-fool * last).sum(), last, most)
    assert float(lam) == pytest.approx(min(2 * rec / (2 * fool + 1e-4), most))
    assert not lam.requires_grad

def test_lam_is_measured_in_float32_under_autocast():
    """At the last layer: its output, and so its gradient, is that of a float32 convolution."""
    decoder, seen = rough(vqldm.Decoder((8, 8), 4)), []
    decoder.last.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with bf16():
        x_hat = decoder(randn(1, 4, 4, 4))
        assert vqldm.PatchDiscriminator((8, 8))(x_hat).dtype == torch.float32
    want = F.conv2d(seen[0].float(), *decoder.last.parameters(), padding=1)
    assert x_hat.dtype == torch.float32 and torch.allclose(x_hat, want, atol=1e-6)

@pytest.fixture()
def random_lpips(monkeypatch):
    blind_lpips(monkeypatch)
    torch.manual_seed(0)
    return vqldm.load_lpips("auto", "cpu")

def test_lpips_is_frozen_in_eval_mode_and_passes_a_gradient_to_the_image(random_lpips):
    modules = list(random_lpips.modules())
    assert not any(m.training for m in modules) and any(isinstance(m, nn.Dropout) for m in modules)
    assert not any(p.requires_grad for p in random_lpips.parameters())
    x, x_hat = randn(2, 2, 3, 64, 64).requires_grad_()
    assert not random_lpips(x, x).any() and grads(random_lpips(x_hat, x).sum(), (x_hat,))[0].any()

def test_lpips_and_its_features_see_images_from_minus_1_to_1(random_lpips):
    seen, u8 = [], (60 * randn(2, 3, 64, 64).clamp(-2, 2) + 128).byte()
    x, scaling = u8 / 255 * 2 - 1, random_lpips.scaling_layer
    scaling.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = vqldm.features(random_lpips, u8)
    large = F.interpolate(x, (224, 224), mode="bilinear")
    assert torch.allclose(*seen, large, atol=1e-4)
    mean = random_lpips.net(scaling(large))[-1].mean((2, 3))
    assert torch.allclose(found.float(), mean, atol=1e-5)

# ---- 7, 10. References: both trainings, written out plainly ------------------------------------
# They share the program's modules and the keys of its random numbers, and nothing of its loops.

def drawn(cfg):
    """-> all images in [-1,1], rows to train on, held-out rows, as the embedded data has them."""
    images = torch.stack([vqldm.synthetic(i, cfg.size, cfg.seed) for i in range(cfg.n_images)])
    held = torch.arange(cfg.n_images) // 4 % 10 == 0
    val = held.nonzero()[:, 0]
    val = val[torch.randperm(len(val), generator=rng("held out"))]
    return images.float() / 127.5 - 1, (~held).nonzero()[:, 0], val

def steps_of(cfg, train):
    """Step, its rows, how far the run is, factor of all learning rates. A minute has ten steps."""
    orders = [torch.randperm(len(train), generator=rng(cfg.seed, "order", i)) for i in range(9)]
    rows = train[torch.cat(orders)].split(cfg.batch_size)
    n = math.ceil(len(train) * cfg.epochs / cfg.batch_size)
    n = int(10 * cfg.minutes) if cfg.minutes else n
    for i in range(n):
        progress = i / n
        yield i, rows[i], progress, max(0.01, min(1, (i + 1) / 50, (1 - progress) / 0.6))

def adam(params, betas=(0.9, 0.99)):
    return torch.optim.Adam(params, 0.0, betas, fused=True)

def step_along(net, loss, optimizers, factor):
    """One step of {optimizer: learning rate}, on a gradient no longer than 1."""
    params = list(net.parameters())
    for p, g in zip(params, torch.autograd.grad(loss, params)):
        p.grad = g.contiguous()                                 # fused Adam takes it as it lies
    nn.utils.clip_grad_norm_(params, 1.0)
    for optimizer, lr in optimizers.items():
        optimizer.param_groups[0]["lr"] = factor * lr
        optimizer.step()

def plain_vq(cfg, lpips, mixed):
    """-> VQGAN, D, how often each code won since the restart, what a log should tell."""
    (images, train, val), seed = drawn(cfg), cfg.seed
    torch.manual_seed(seed)
    net = vqldm.VQGAN(cfg.widths, 3, cfg.codes, cfg.upsample)
    disc = vqldm.PatchDiscriminator(cfg.widths)
    book, named = net.codebook, dict(net.named_parameters())
    inner = [n for n, p in named.items()
             if cfg.muon_lr and p.dim() == 4 and not re.search("first|last", n)]
    rest = [p for n, p in named.items() if n not in inner and "embedding" not in n]
    optimizers = {adam(rest): cfg.lr, adam([book.embedding.weight]): cfg.codes_lr,
                  vqldm.Muon([named[n] for n in inner], 0.0): cfg.muon_lr}
    optimizers_d = {adam(disc.parameters(), (0.5, 0.9)): cfg.d_lr}
    first = train[torch.randperm(len(train), generator=rng(seed, "order", 0))[:64]]
    book.restart_unused(net.encoder(images[first]).detach(), rng(seed, "first codes"))
    told = {}

    for i, rows, progress, factor in steps_of(cfg, train):
        turns = torch.randint(8, (len(rows),), generator=rng(seed, "turns", i))
        x, joined = vqldm.augment(images[rows], turns), progress - cfg.gan_start
        with mixed:
            z = net.encoder(x).float()
            code = book.lookup(k := book.nearest(z))
            x_hat = net.decoder(z + (code - z).detach())
        mse = F.mse_loss(x_hat, x)
        rec = mse + cfg.lpips_weight * lpips(x_hat, x).mean() if lpips else mse
        loss = rec + F.mse_loss(code, z.detach()) + cfg.commit_weight * F.mse_loss(z, code.detach())
        if joined >= 0:
            with mixed:
                real, fool = disc(x), -disc(x_hat).mean()
            push_rec, push = [grads(f, net.decoder.last.weight)[0].norm() for f in (rec, fool)]
            lam = (push_rec / (push + 1e-4)).clamp(max=cfg.lam_max)
            loss = loss + cfg.gan_weight * lam * fool
        step_along(net, loss, optimizers, factor)
        book.wins += torch.bincount(k.flatten(), minlength=cfg.codes)
        if (i + 1) % 50 == 0:
            told["restarted"] = (book.wins == 0).sum()
            book.restart_unused(z, rng(seed, "restart", i))
        if joined >= 0:
            with mixed:
                fake = disc(x_hat.detach())
            loss_d = F.relu(1 - real).mean() / 2 + F.relu(1 + fake).mean() / 2
            step_along(disc, loss_d, optimizers_d, factor)
            if i % 10 == 9:
                told.update(mse=mse, lam=lam, d_loss=loss_d, d_real=real.mean(), d_fake=-fool)
    with mixed, torch.no_grad():
        x_hat = net.decoder(book.lookup(book.nearest(net.encoder(images[val])))).clamp(-1, 1)
    told = {name: float(value.detach()) for name, value in told.items()}
    return net, disc, book.wins, {**told, "held_mse": float(F.mse_loss(x_hat, images[val]))}

def plain_ldm(cfg, vq_cfg, vqgan, scale, mixed):
    """-> UNet, its running mean, its guide, the held-out losses of the mean and of the UNet."""
    (images, train, val), seed, B = drawn(vq_cfg), cfg.seed, cfg.batch_size
    n_classes = 0 if cfg.unconditional else 3
    labels, book = torch.arange(len(images)) % 3, vqgan.codebook
    with mixed, torch.no_grad():
        codes = book.lookup(book.nearest(vqgan.encoder(images)))
    each = codes[train].transpose(0, 1).flatten(1)
    assert torch.allclose(scale, torch.stack([each.mean(1), each.std(1, correction=0)]), rtol=1e-4)
    latents = (codes - scale[0].view(-1, 1, 1)) / scale[1].view(-1, 1, 1)
    torch.manual_seed(seed)
    net = vqldm.UNet(vq_cfg.z_dim, cfg.widths, n_classes, cfg.upsample)
    ema, guide, optimizers = copy.deepcopy(net), None, {adam(net.parameters()): cfg.lr}
    alpha_bar = Diffusion(cfg.T, cfg.schedule).alpha_bar

    def errors(net, z0, t, eps, label):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        goal = a.sqrt() * eps - (1 - a).sqrt() * z0 if cfg.target == "v" else eps
        with mixed:
            out = net(a.sqrt() * z0 + (1 - a).sqrt() * eps, t, label)
        return (out - goal).square().flatten(1).mean(1)

    for i, rows, progress, factor in steps_of(cfg, train):
        draw = rng(seed, "step", i)
        if cfg.balance:
            chance = 1 / torch.bincount(labels[train])[labels[train]]
            rows = train[torch.multinomial(chance, B, True, generator=draw)]
        t = torch.randint(0, cfg.T, (B,), generator=draw)
        eps = torch.randn(B, *latents.shape[1:], generator=draw)
        label = torch.where(torch.rand(B, generator=draw) < 0.1, n_classes, labels[rows])
        loss, a = errors(net, latents[rows], t, eps, label), alpha_bar[t]
        if cfg.target == "v":
            loss = loss * (2 * (a * (1 - a)).sqrt()).clamp(min=0.25)
        step_along(net, loss.mean(), optimizers, factor)
        keep = min(cfg.ema, (1 + i) / (10 + i))
        for m, p in zip(ema.parameters(), net.parameters()):
            m.data = keep * m.data + (1 - keep) * p.data
        if progress < 0.2:
            guide = copy.deepcopy(ema)
    t = torch.arange(len(val)) * cfg.T // len(val)
    eps = torch.randn(latents[val].shape, generator=rng("held-out noise"))
    both = [errors(m, latents[val], t, eps, labels[val]).detach() for m in (ema, net)]
    return net, ema, guide, *both

def blurred(x_hat, x):          # stands in for LPIPS, which wants float32
    assert not torch.is_autocast_enabled("cpu")
    return F.avg_pool2d(x_hat.float() - x, 4).square().mean((1, 2, 3))
blurred.pnet_type = "squeeze"

REPORT = dict(                          # the report's system, as settings of both stages
    vq=dict(upsample="transposed", commit_weight=1.0, lpips_weight=1.0, gan_weight=1.0,
            lam_max=1e4, gan_start=0.267, muon_lr=0.0, lr=3e-4, codes_lr=3e-4, d_lr=3e-4),
    ldm=dict(upsample="transposed", unconditional=True, balance=False, target="eps",
             schedule="linear", sampler="ddpm", steps=1000, guidance=1.0))

@pytest.fixture(scope="module", params=["float32", "bfloat16", "report"])
def runs(request, tmp_path_factory):
    """Both stages, trained by the program: with Muon and v, D joining late, lest rounding decides
    near ties of codes; in bf16 with Adam, ε, balance, by the clock; and the report's system."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    vq_cfg = vqldm.VQConfig(size=32, n_images=46, widths=(4, 8), codes=512, batch_size=4, epochs=6,
                            seed=6, lpips_weight=0.5, gan_start=0.75, lr=5e-4, muon_lr=0.005,
                            codes_lr=0.005, d_lr=2e-3, out=str(folder / "vq"))
    cfg = vqldm.LDMConfig(vq=vq_cfg.out, T=10, widths=(8, 12), ema=0.6, lr=1e-2, batch_size=2,
                          epochs=2, seed=5, out=str(folder / "ldm"))
    if kind == "bfloat16":
        vq_cfg = vqldm.replace(vq_cfg, minutes=1.6, gan_start=0.3, muon_lr=0.0, codes_lr=0.05)
        cfg = vqldm.replace(cfg, minutes=2.0, target="eps", schedule="linear", balance=True)
    if kind == "report":
        vq_cfg = vqldm.replace(vq_cfg, epochs=2, **REPORT["vq"])
        cfg = vqldm.replace(cfg, epochs=1, **REPORT["ldm"])
    lpips, mixed = blurred, bf16(kind == "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        three_kinds(patch)
        pictures(patch)
        patch.setattr(vqldm, "pick_device", lambda cfg: ("cpu", mixed))
        patch.setattr(vqldm, "load_lpips", lambda wanted, device: lpips)
        patch.setattr(vqldm.Run, "seconds", lambda run: 6.0 * run.step)
        assert vqldm.train_vq(vq_cfg) == vqldm.train_ldm(cfg) == 0
    vq, ldm = [vqldm.load_checkpoint(c.out, "", kind) for c, kind in ((vq_cfg, "vq"), (cfg, "ldm"))]
    model = vqldm.LatentDiffusion(ldm, "cpu", mixed)
    return types.SimpleNamespace(kind=kind, mixed=mixed, lpips=lpips, vq_cfg=vq_cfg, cfg=cfg,
                                 vq=vq, ldm=ldm, model=model)

def three_kinds(patch):                 # lots hold four images each; with four classes in turn
    patch.setattr(vqldm, "LESIONS", dict(list(vqldm.LESIONS.items())[1:]))  # 0, 4… were of one

def assert_same(state, net):            # or how far off the worst are, in units of the allowed
    off = {name: float(((state[name] - p).abs() / (1e-4 + 1e-3 * p.abs())).max().detach())
           for name, p in net.named_parameters()}
    assert max(off.values()) <= 1, sorted(off.items(), key=lambda row: -row[1])[:3]

def test_reference_stage_1_ends_with_the_weights_of_the_paper_written_out(runs):
    """Learning rates, rows, symmetries, all losses and their weights, lam, what D sees, clipping,
    restarts, D's turn: one of them wrong, and some weight differs. And each gets a gradient."""
    net, disc, wins, want = plain_vq(runs.vq_cfg, runs.lpips, runs.mixed)
    assert_same(runs.vq["model"], net)
    assert_same(runs.vq["disc"], disc)
    assert torch.equal(runs.vq["model"]["codebook.wins"], wins)
    told = {**[row for row in runs.vq["log"] if "mse" in row][-1], **runs.vq["log"][-1]}
    assert all(p.grad.any() for p in net.parameters())
    assert runs.kind != "float32" or want.pop("restarted") > 0
    assert {name: told[name] for name in want} == pytest.approx(want, rel=1e-3)

def test_reference_stage_2_ends_with_the_weights_of_algorithm_1_written_out(runs):
    """And its mean, guide and scale; the held-out loss that it tells is the mean's own."""
    net, ema, guide, held, raw = plain_ldm(
        runs.cfg, runs.vq_cfg, runs.model.vqgan, runs.ldm["scale"], runs.mixed)
    for part, want in (("model", net), ("ema", ema), ("guide", guide)):
        assert_same(runs.ldm[part], want)
    told = runs.ldm["log"][-1]
    assert all(p.grad.any() for p in net.parameters())
    assert told["held_loss"] == pytest.approx(float(held.mean()), rel=2e-4)
    assert told["held_loss"] != pytest.approx(float(raw.mean()), rel=3e-4)

# ---- 8. Diffusion ------------------------------------------------------------------------------
def root(t, T):
    return math.cos((t / T + 0.008) / 1.008 * math.pi / 2)

BETA = dict(linear=lambda t, T: (1e-4 + 0.0199 * t / (T - 1)) * 1000 / T,
            cosine=lambda t, T: 1 - (root(t + 1, T) / root(t, T)) ** 2)

@pytest.mark.parametrize("T", [50, 250, 1000])
@pytest.mark.parametrize("schedule", BETA)
def test_alpha_bar_is_the_product_and_ends_near_0_for_every_T(schedule, T):
    """One rounding, from float64, is its only error; β belongs to its T. Index -1: no noise."""
    a = Diffusion(T, schedule).alpha_bar
    want = np.cumprod([1 - min(BETA[schedule](t, T), 0.999) for t in range(T)])
    np.testing.assert_allclose(a[:-1].double(), want, rtol=1.2e-7)
    assert len(a) == T + 1 and a[-1] == 1 and a[-2] < 0.01 and (a[:-1].diff() < 0).all()

def test_pairs_are_exactly_S_steps_for_every_S():
    """From T-1 strictly down to -1."""
    d = Diffusion(1000)
    for S in range(1, 1001):
        t, prev = zip(*d.pairs(S))
        assert len(t) == S and t[0] == 999 and prev == (*t[1:], -1)
        assert all(a > b for a, b in zip(t, prev))
    assert [t for t, _ in d.pairs(4)] == [999, 749, 499, 249]           # even strides

# Data of the oracle: shares, centres and spreads of round clouds in the plane.
CLOUDS = dict(mixture=([0.5, 0.3, 0.2], [[-1.0, 0.4], [1.0, 0.7], [0.6, -1.6]], [0.25, 0.3, 0.35]),
              point=([1.0], [[5.0, -3.0]], [0.0]))

@pytest.mark.parametrize("data", CLOUDS)
@pytest.mark.parametrize("schedule, S", [("linear", 50), ("cosine", 7), ("linear", 250)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_oracle_every_sampler_draws_the_data_from_the_perfect_network(sampler, schedule, S, data):
    """With E[ε | z_t] for a network the samples have the data's mean, covariance and share of each
    cloud, for both targets. Two errors remain. Chance: 4.5 standard errors of n samples (the
    coordinates have a std below 1, their products below 1.5, a share below 1/2). And finite steps:
    all samplers are of first order, 4/S bounds it for this data. A point is met exactly."""
    n, made, (weight, centre, spread) = 4000, {}, map(torch.tensor, CLOUDS[data])
    def bayes(x, a):        # for x = √a z0 + √(1-a) ε: p(cloud | x) (n,clouds), and E[ε | x] (n,2)
        var, away = a * spread ** 2 + 1 - a, x[:, None] - a.sqrt() * centre
        p = (weight.log() - var.log() - away.square().sum(2) / var / 2).softmax(1)
        return p, ((1 - a).sqrt() * away / var[:, None] * p[:, :, None]).sum(1)
    for target in ("v", "eps"):
        d, fresh = Diffusion(250, schedule, target), (randn(n, 2, 1, 1, key=i) for i in range(S))

        def net(z, t, d=d):
            a, eps = d.alpha_bar[t[0]], bayes(z.flatten(1), d.alpha_bar[t[0]])[1].view_as(z)
            return eps if d.target == "eps" else (eps - (1 - a).sqrt() * z) / a.sqrt()
        *_, (z, z0_hat) = d.sample(net, next(fresh), S, sampler, lambda f=fresh: next(f))
        assert torch.allclose(z, z0_hat, atol=1e-4)     # no noise after the last step
        made[target] = z.flatten(1)
    x, chance, mean = made["v"], 4.5 / math.sqrt(n), weight @ centre
    assert (x - made["eps"]).abs().max() < 0.02         # one formula in two costumes
    assert data != "point" or (x - centre).abs().max() < 0.02
    cov = (centre.T * weight) @ centre - mean[:, None] * mean + weight @ spread ** 2 * torch.eye(2)
    share = torch.bincount(bayes(x, torch.tensor(0.999))[0].argmax(1), minlength=len(weight)) / n
    assert (x.mean(0) - mean).abs().max() < chance + 1 / S
    assert (x.T.cov() - cov).abs().max() < 1.5 * chance + 4 / S
    assert (share - weight).abs().max() < chance / 2 + 1 / S

# ---- 9. The UNet -------------------------------------------------------------------------------
@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
def test_unet_is_down_middle_and_up_with_skips_of_the_same_size_and_hears_time_and_class(upsample):
    """emb is time, in sines of periods 2π to 2π·10,000, plus class."""
    net, z = rough(vqldm.UNet(3, (8, 12), 3, upsample)), randn(3, 3, 8, 8)
    label, t = torch.arange(3), torch.tensor([5, 50, 999])
    angle = t.double()[:, None] / 10_000 ** (torch.arange(16).double() / 16)
    emb = net.time(torch.cat([angle.sin(), angle.cos()], 1).float()) + net.label.weight[:3]
    y = written_out(net, z, emb)
    assert torch.allclose(net(z, t, label), y, atol=1e-3) and y.shape == z.shape
    assert vqldm.levels((16, 64, 32)) == [(16, 16), (16, 64), (64, 32)]
    for other in (net(z, t + 1, label), net(z, t, label.flip(0)), net(z, t)):
        assert (y - other).abs().max() > 1e-3
    assert torch.equal(net(z, t), net(z, t, torch.full((3,), 3)))       # class 3 of 0…2: not told
    free = rough(vqldm.UNet(3, (8, 12), 0, upsample))                   # unconditional
    assert torch.equal(free(z, t), free(z, t, label)) and free(z, t).any()

# ---- 10, 11. Running mean, sampling ------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "recorded"])
def test_reference_sampling_ends_with_the_latents_of_the_papers_written_out(runs, sampler):
    """Of the running mean, led by the guide where ᾱ > 0.1; each image with noise of its own,
    whatever batch it is in.
    recorded: as the training says, so the report's in all T steps, unguided.
    ddim: eq. 12, σ = 0. ddpm: the mean of q(z_prev | z_t, z0), DDPM eq. 7, and σ² = β."""
    def fresh():
        return torch.stack([torch.randn(3, 8, 8, generator=g) for g in own])
    model, some, label = runs.model, [33, 4, 9], torch.tensor([2, 0, 1]).repeat(12)
    how = dict(steps=7, sampler=sampler, guidance=3.0)
    if sampler == "recorded":
        how = {name: runs.ldm["config"][name] for name in how}
    cfg = vqldm.SampleConfig(**how, seed=8)
    own = [rng(8, "sample", 7 * i) for i in some]
    unet = vqldm.UNet(3, runs.cfg.widths, 0 if runs.cfg.unconditional else 3, runs.cfg.upsample)
    strong, young = [vqldm.frozen(copy.deepcopy(unet), runs.ldm[name], "cpu")
                     for name in ("ema", "guide")]
    z = fresh()
    for t, prev in model.diffusion.pairs(min(cfg.steps, 10)):
        a, p, t_all = *model.diffusion.alpha_bar[[t, prev]], torch.full((3,), t)
        with runs.mixed, torch.no_grad():
            out = strong(z, t_all, label[some])
            if a > 0.1:
                out = (weak := young(z, t_all)) + cfg.guidance * (out - weak)
        eps = out if runs.cfg.target == "eps" else (1 - a).sqrt() * z + a.sqrt() * out
        z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        if cfg.sampler == "ddim":
            z = p.sqrt() * z0 + (1 - p).sqrt() * eps
        else:
            z = (p.sqrt() * (1 - a / p) * z0 + (a / p).sqrt() * (1 - p) * z) / (1 - a)
            z = z + (1 - a / p).sqrt() * fresh() if prev >= 0 else z
    pictures, latents = model.images(cfg, range(0, 252, 7), label)
    assert torch.allclose(latents[some], z, rtol=1e-5, atol=1e-5 * float(z.std()))
    with runs.mixed, torch.no_grad():
        mean, std = model.scale.view(2, 3, 1, 1)
        k = model.vqgan.codebook.nearest(latents[32:] * std + mean)
        x = model.vqgan.decoder(model.vqgan.codebook.lookup(k))
    assert torch.equal(pictures[32:], ((x.clamp(-1, 1) + 1) * 127.5).round().byte())

# ---- E. Measuring, F. Muon ---------------------------------------------------------------------
def test_reconstructions_are_measured_by_numbers_worked_out_by_hand():
    """The VQGAN here rounds each pixel to the nearest of four greys; 96 images are several parts.
    PSNR: 10 log10(2²/mse) of each
    image, in [-1,1]; perplexity: 2 codes in proportion 3 : 1 are e^H = 4 / 3^(3/4) = 1.75."""
    vqgan, seen = vqldm.VQGAN((8,), 3, 4), []
    vqgan.encoder = vqgan.decoder = nn.Identity()
    vqgan.codebook.embedding.weight.data = torch.tensor([[-1], [-0.2], [0.23], [1.2]]).expand(4, 3)
    u8 = torch.tensor(72 * [179] + 24 * [255]).byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    def lpips(*images):
        seen.extend(torch.stack(images)[:, :, 0, 0, 0].T.tolist())
        return 2 * (images[1].mean((1, 2, 3)) > 0.9)
    numbers, copies = vqldm.reconstruct(vqgan, u8, lpips, bf16(False))
    x = 179 / 127.5 - 1                                 # 0.404, rounded to 0.23; 1 to 1.2, so to 1
    mse = (x - 0.23) ** 2
    psnr = (3 * 10 * math.log10(4 / mse) + 10 * math.log10(4 / 1e-10)) / 4
    assert numbers == pytest.approx(dict(
        mse=0.75 * mse, psnr=psnr, lpips=0.5, codes_used_percent=50, perplexity=4 / 3 ** 0.75),
        rel=1e-3)
    assert seen == [pytest.approx(pair) for pair in 72 * [[0.23, x]] + 24 * [[1, 1]]]
    assert copies[:, 0, 0, 0].tolist() == 72 * [157] + 24 * [255]
    assert vqldm.to_bytes(torch.tensor([-7, 7])).tolist() == [0, 255]

def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    def mean(pairs):
        return np.mean([float((u @ v / 3 + 1) ** 3) for u, v in pairs])
    a, b = randn(5, 3).double(), randn(5, 3, key=1).double() + 1
    within = sum(mean(itertools.permutations(u, 2)) for u in (a, b))        # no image with itself
    between = mean((a[i], b[j]) for i, j in itertools.permutations(range(5), 2))    # nor its twin
    assert vqldm.kernel_distance(a, b) == pytest.approx(within - 2 * between)

@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 9), (9, 1), (8, 8), (16, 144), (128, 64)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_lengths(rows, columns):
    """U S Vᵀ -> U S' Vᵀ with all of S' near 1, though S spans a factor of 30: against the SVD."""
    u, _, v = torch.linalg.svd(randn(rows, columns), full_matrices=False)
    inner = u.T @ vqldm.orthogonal(u * torch.logspace(0, -1.5, len(v)) @ v) @ v.T
    assert 0.6 < inner.diag().min() and inner.diag().max() < 1.3
    assert torch.allclose(inner, inner.diag().diag(), atol=1e-3)

@pytest.mark.parametrize("shape", [(16, 2, 2, 2), (2, 3, 3, 3)])
def test_muon_steps_along_the_orthogonal_of_the_gradient_and_its_running_mean(shape):
    """m <- .95 m + .05 g; a step of lr along orthogonal(.95 m + .05 g)."""
    p = nn.Parameter(randn(*shape))
    muon, want, mean = vqldm.Muon([p], 0.1), p.detach().clone(), 0
    for step in range(3):
        p.grad = g = randn(*shape, key=step)
        mean = 0.95 * mean + 0.05 * g
        want -= 0.1 * vqldm.orthogonal((0.95 * mean + 0.05 * g).flatten(1)).view(shape)
        muon.step()
    assert torch.allclose(p, want, atol=1e-5)

# ---- Part 2: data, commands, command line, words -------------------------------------------------
HERE, CPU = Path(vqldm.__file__).parent, torch.device("cpu")
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals, links, gloo as POSIX has them")
vqldm.build_parser = functools.cache(vqldm.build_parser)    # the dearest part of a short command
DRAW_ROWS, DRAW_PREVIEW = vqldm.draw_rows, vqldm.draw_preview
DRAW_CURVES = vqldm.draw_curves
state_of = functools.partial(torch.load, weights_only=True)

def cli(*words):                        # the command, run in this process -> exit status
    try:
        return vqldm.main([str(word) for word in words]) or 0
    except SystemExit as e:
        return e.code

def pictures(patch, draw=lambda *a: None):      # none: they take most of a tiny run's time
    for name in [name for name in dir(vqldm) if name.startswith("draw_")]:
        patch.setattr(vqldm, name, functools.partial(draw, getattr(vqldm, name)))

@pytest.fixture(autouse=True)
def at_home(request, monkeypatch):      # in the folder of the runs that a test asks for
    pictures(monkeypatch)
    if "runs" in request.fixturenames:
        three_kinds(monkeypatch)
    for name in {"trained", "calm"} & {*request.fixturenames}:
        monkeypatch.chdir(request.getfixturevalue(name)[0])

def blind_lpips(patch):
    import lpips                        # with a random trunk: enough, and without a download
    patch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))

def hook(patch, owner, name, before=lambda *a: None, after=lambda result, *a: None):
    function = getattr(owner, name)
    def call(*a):
        before(*a)
        result = function(*a)
        after(result, *a)
        return result
    patch.setattr(owner, name, call)

def recorded(patch, owner, name):       # -> a list that gets (arguments, result) of each call
    calls = []
    hook(patch, owner, name, after=lambda result, *a: calls.append((a, result)))
    return calls

@pytest.fixture()
def refused(capsys):
    def call(*words):                   # -> the one sentence with which it ends, status 2
        capsys.readouterr()
        assert cli(*words) == 2
        assert re.fullmatch("vqldm: .+\n", said := capsys.readouterr().err), said
        return said
    return call

# ---- A, B. Drawn lesions, a folder of images ---------------------------------------------------
def test_a_drawn_lesion_is_a_function_of_its_seed_and_number_and_shows_its_class(tmp_path):
    """Each two classes differ in the mean or the spread of some colour, by 4 standard errors."""
    keys = [(i, 24, seed) for seed in (0, 1) for i in range(8)]
    drawn = torch.stack([vqldm.synthetic(*key) for key in keys])
    assert torch.equal(drawn, torch.stack([vqldm.synthetic(*key) for key in keys[::-1]]).flip(0))
    assert len(drawn.unique(dim=0)) == 16 and drawn.float().flatten(1).std(1).min() > 8
    for seed in (0, 1):                 # two sets in one cache
        cfg = vqldm.VQConfig(size=24, n_images=8, seed=seed)
        rows = vqldm.Images("synthetic", cfg, tmp_path).rows(torch.arange(8))
        assert torch.equal(rows, drawn[8 * seed:][:8])
    images = vqldm.Images("synthetic", vqldm.VQConfig(size=24, n_images=160), tmp_path)
    assert images.labels.tolist() == [0, 1, 2, 3] * 40 and images.classes == sorted(vqldm.LESIONS)
    assert torch.bincount(images.labels[images.val]).tolist() == [4] * 4
    pixels = images.rows(torch.arange(160)).float()
    middle = pixels[..., 6:18, 6:18].flatten(2).view(40, 4, 3, -1)
    assert (middle[:, :, 0] - middle[:, :, 1]).mean((0, 2)).argmax() == 3       # vascular: reddest
    for a, b in itertools.combinations(torch.cat([middle.mean(3), middle.std(3)], 2).unbind(1), 2):
        assert ((a.mean(0) - b.mean(0)).abs() / ((a.var(0) + b.var(0)) / 40).sqrt()).max() > 4

def picture(mode="RGB", left="red", right="blue", size=(40, 40)):
    im = Image.new(mode, size, left)
    im.paste(right, (size[0] // 2, 0, *size))
    return im

def fill(folder, names, colour=(0, 0, 99), size=(40, 40)):     # of 37 no two are alike
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        left = tuple(c + i * k % 37 for c, k in zip(colour, (1, 5, 11)))
        picture(left=left, right=colour, size=size).save(folder / name)
    return folder

@pytest.fixture()
def load(tmp_path):
    return lambda folder: vqldm.Images(str(folder), vqldm.VQConfig(size=16), tmp_path / "cache")

def test_every_kind_of_image_comes_out_upright_and_in_its_colours(tmp_path, load):
    red, green, blue, black, grey, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), 0, 128, 255
    ramp = Image.fromarray(np.repeat(np.array([[0, 32896]], np.uint16), 20, 1).repeat(40, 0))
    hidden = picture("RGBA", (0, 255, 0, 0), (0, 0, 255, 255))      # green that nobody can see
    palette, plain, turned = picture("P", 1, 2), picture(), Image.Exif()
    palette.putpalette([9, 9, 9, *green, *blue])
    turned[0x0112] = 6                                              # "turn me right"
    kinds = {"UPPER.JPG": (plain, red), "palette.gif": (palette, green), "16b.png": (ramp, black),
             "four inks.jpg": (plain.convert("CMYK"), red), "palette.png": (palette, white),
             "large ü.jpg": (picture(size=(2000, 1500)), red), "hidden.png": (hidden, white),
             "turned.jpg": (plain.rotate(90), red), "grey.bmp": (picture("L", 0, 255), black),
             "no red.png": (plain, white)}
    for name, (im, _) in kinds.items():
        how = {"palette.png": dict(transparency=1), "turned.jpg": dict(exif=turned),
               "no red.png": dict(transparency=red)}
        im.save(fill(tmp_path / "all", []) / name, **how.get(name, {}))
    images = load(tmp_path / "all")
    assert sorted(images.names) == sorted(kinds)
    for name, x in zip(images.names, images.rows(torch.arange(len(kinds))).double()):
        right = {"16b.png": grey, "grey.bmp": white}.get(name, blue)
        for half, colour in ((x[:, 3:13, 1:6], kinds[name][1]), (x[:, 3:13, 10:15], right)):
            assert (half.mean((1, 2)) - torch.tensor(colour)).abs().max() <= 8, name
        assert kinds[name][1] != white or (x[0] - x[1]).abs().max() <= 8, name      # no fringe

@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_square_of_a_photograph_is_scaled_smoothly(tmp_path, load, wide):
    """80x40: a mesh of black and white pixels, so all comes out grey; left and right of it: red."""
    mesh = np.indices((40, 80)).sum(0) % 2 * 255
    pixels = np.stack([mesh] * 3, 2).astype(np.uint8)
    pixels[:, :19] = pixels[:, 61:] = 255, 0, 0
    im = Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2).copy())
    im.save(fill(tmp_path / "all", []) / "a.png")
    x = load(tmp_path / "all").rows(torch.arange(1)).int()
    assert (x - 128).abs().max() < 20

def test_bad_images_are_named_and_passed_over_and_what_is_no_photograph_is_not_opened(
        tmp_path, load, capsys):
    good = [f"{i}.png" for i in range(11)] + ["ä b.JPeG", "z.tiff"]
    folder = fill(tmp_path / "photos", [*good, "cut.jpg"], size=(200, 200))
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.new("F", (9, 9)).save(folder / "floats.tiff")         # they would be black
    for name in ("text.jpg .hidden.png q-partial.jpg I_1_segmentation.png a.txt .git/x.png "
                 "grid.png trajectory.png recon_epoch_1.5.png my/runs/a.png masks/a.png "
                 "I_1_superpixels.png I_2_expert.png").split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    images, told = load(folder), capsys.readouterr().out
    assert sorted(images.names) == sorted(good) and images.classes == ["images"]
    assert "skipped 3 " in told and "text.jpg" in told
    assert "('cut.jpg', \"OSError(" in told     # in words: the exception would hold the image
    for name in good[:5]:
        (folder / name).unlink()
    with pytest.raises(UserError, match="more than a fifth"):
        load(folder)

def test_folders_are_classes_and_train_and_test_the_split(tmp_path, load):
    """latest, which ends in test, is a class like others."""
    folder, kinds = tmp_path / "Skin cancer", ["basal cell carcinoma", "latest", "with_mask"]
    for part, c in itertools.product(("Train", "Test"), kinds):
        fill(folder / part / c, [f"{i}.png" for i in range(20 if part == "Test" else 3)])
    (folder / "metadata.csv").write_text("isic_id,dx\n1,scar")              # weighs less
    images = load(folder)
    assert images.classes == kinds and len(images.train) == 9
    for i, name in enumerate(images.names):
        assert images.classes[images.labels[i]] == Path(name).parts[1]
        assert (i in images.val) == name.startswith("Test")
    assert torch.bincount(images.labels[images.val[:20]], minlength=3).min() > 3      # a mixture

@pytest.mark.parametrize("place, key, lesions", [("isic", "isic_id", 40), ("isic", "isic_id", 3),
                                                 ("isic/HAM10000_images_part_1", "image_id", 40)])
def test_a_table_tells_the_classes_and_keeps_photographs_of_a_lesion_on_one_side(
        tmp_path, load, capsys, place, key, lesions):
    fill(tmp_path / place, [f"{i:03d}.png" for i in range(120)], size=(8, 8))
    kinds = ("Benign,Nevus,", "Bad,,", ",,scar", ",,")
    rows = [f"{i:03d},L{i % lesions},{kinds[i % 4]}" for i in range(120)]
    rows = "\n".join([f"\ufeff{key},lesion_id,diagnosis_1,diagnosis_3,dx", *rows])
    name = {"isic_id": "Metadata.csv", "image_id": "HAM10000_metadata.csv"}[key]
    ((tmp_path / place).parent / name).write_text(rows, encoding="utf8")
    (tmp_path / "mad.csv").write_text("isic_id,dx\n003," + "x" * 200_000)      # over csv's limit
    (tmp_path / "isic/mean.csv").write_text(f"{key},diagnosis_3\n000,")     # takes none away
    images = load(tmp_path / "isic")
    assert f"table {name} names 120 images" in (told := capsys.readouterr().out)
    assert "WARNING" not in told
    assert [images.classes[k] for k in images.labels[:4]] == ["Nevus", "Bad", "scar", "images"]
    train, val = ({int(images.names[i][-7:-4]) % lesions for i in rows}
                  for rows in (images.train, images.val))
    assert len(train) + len(val) == lesions and not train & val and 0 < len(val) < 12

@POSIX
def test_images_are_decoded_once_and_again_when_they_or_what_they_link_to_change(tmp_path, load):
    folder, far = fill(tmp_path / "photos", ["a.png", "b.png"]), tmp_path / "elsewhere/target.png"
    fill(far.parent, [far.name])
    (folder / "link.png").symlink_to(far)
    (folder / "linked").symlink_to(far.parent)
    seen, cache = [], tmp_path / "cache"
    for changed in ([], [], [folder / "b.png"], [far]):
        for path in changed:
            fill(path.parent, [path.name], (200, 0, 99))
        seen.append((load(folder).rows(torch.arange(4)), len(list(cache.glob("p*")))))
    changes = [[not torch.equal(*pair) for pair in zip(a, b)]
               for (a, _), (b, _) in itertools.pairwise(seen)]
    assert changes == [[False] * 4, [False, True, False, False], [False, False, True, True]]
    assert [files for _, files in seen] == [1, 1, 2, 3]
    images = load(fill(tmp_path / "v1.0", ["a.png", "b.png"]))
    assert len(images.train) == len(images.val) == 1            # a handful is enough
    larger = vqldm.Images(str(tmp_path / "v1.0"), vqldm.VQConfig(size=24), cache)
    assert larger.rows(torch.arange(2)).shape == (2, 3, 24, 24)         # another file

# ---- 11, D, E. What the commands write ---------------------------------------------------------
@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")        # the four commands ran there in a row
    with pytest.MonkeyPatch.context() as patch:
        pictures(patch, lambda draw, path, *a: path.exists() or draw(path, *a))
        blind_lpips(patch)
        patch.chdir(folder)
        for words in ("train-vq --preset tiny --lpips off --n-images 80 --epochs 1",
                      "train-ldm --preset tiny --epochs 3 --T 8", "sample --n 5 --steps 5"):
            assert cli(*words.split()) == 0
        calls = [recorded(patch, vqldm, "reconstruct"), recorded(patch, vqldm, "features"),
                 recorded(patch, vqldm.LatentDiffusion, "images")]
        assert cli("evaluate", "--n", 8) == 0
    return folder, *calls

@pytest.mark.parametrize("run, score, files", [
    ("vq", "mse", "last.pt log.csv curves.png data_preview.png"),
    ("ldm", "loss", "last.pt log.csv curves.png metrics.json evaluate.png"),
    ("samples", "", "grid.png " + " ".join(vqldm.LESIONS))])
def test_a_run_leaves_the_files_of_the_design(trained, run, score, files):
    looks = {path.name for path in Path("runs", run).glob("*_epoch_*.png")}
    assert {path.name for path in Path("runs", run).iterdir()} - looks == set(files.split())
    for path in Path("runs", run).rglob("*.png"):
        with Image.open(path) as im:
            least = 500 if path.stem == "data_preview" else 100         # a row for each class
            assert im.size == (32, 32) if path.stem.isdigit() else min(im.size) > least
    if score:
        log = state_of(f"runs/{run}/last.pt")["log"]
        names, *rows = [line.split(",") for line in Path(f"runs/{run}/log.csv").read_text().split()]
        told = [{k: float(v) for k, v in zip(names, row) if v} for row in rows]
        held = [row[f"held_{score}"] for row in told if f"held_{score}" in row]
        assert told == [pytest.approx(row) for row in log] and held[-1] < held[0]
        assert len(held) == len(looks) > 8              # no look overwrites another

def test_metrics_are_flat_and_each_distance_is_to_the_set_that_it_names(trained):
    numbers = json.loads(Path("runs/ldm/metrics.json").read_text())
    _, (((_, real, *_), (_, copies)), ((_, other, *_), (_, perfect))), calls, made = trained
    (samples, z0), seen = made[0][1], {x.numpy().tobytes(): found for (_, x), found in calls}
    for name, images in dict(_perfect=perfect, _recon=copies, _real=other, **{"": samples}).items():
        a, b = (seen[x.numpy().tobytes()] for x in (real, images))
        assert numbers.pop("kernel" + name) == pytest.approx(vqldm.kernel_distance(a, b), rel=1e-3)
    assert numbers.pop("latent_std") == pytest.approx(float(z0.std())) and numbers.pop("n") == 4
    assert set(numbers) == set(
        "psnr mse lpips codes_used_percent perplexity near_copies_percent".split())
    cfg = vqldm.VQConfig(**state_of("runs/vq/last.pt")["config"])
    images = vqldm.Images("synthetic", cfg, Path("runs/cache"))
    assert len(torch.cat([real, other, images.rows(images.train)]).unique(dim=0)) == 4 + 4 + 72

@pytest.mark.parametrize("words, labels", [
    ("", [0, 1, 2, 3, 0]), ("--class nevus-like --sampler ddpm", [2] * 5)])
def test_sample_makes_what_it_is_asked_for(trained, tmp_path, monkeypatch, words, labels):
    shutil.copy("runs/ldm/last.pt", tmp_path / "one.pt")       # all that it needs
    monkeypatch.chdir(tmp_path)
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "images")
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    assert cli(*f"sample --ckpt one.pt --out out --n 5 --steps 2 {words}".split()) == 0
    (model, _, numbers, label), (images, _) = made[0]
    grid = {model.classes[k]: images[label == k] for k in labels}
    path, shown = drawn[0][0]
    assert path.name == "grid.png" and same(shown, grid)
    assert list(numbers) == list(range(5)) and label.tolist() == labels
    assert len(list(Path("out").rglob("*.png"))) == 5
    for i, k in enumerate(labels):
        with Image.open(f"out/{model.classes[k]}/{i:05d}.png") as im:
            assert np.array_equal(np.asarray(im).transpose(2, 0, 1), images[i])

def test_a_class_name_is_neither_a_path_nor_a_formula(trained, tmp_path, monkeypatch):
    state = state_of("runs/ldm/last.pt")
    state["classes"] = ["../../up", "/tmp/up", "$\\frac$", "_tmp_up"]      # two in one folder
    monkeypatch.chdir(tmp_path)
    torch.save(state, "one.pt")
    assert cli(*"sample --ckpt one.pt --out a/out --n 4 --steps 1".split()) == 0
    assert len(list(Path("a/out").glob("*/0*.png"))) == 4 == len(list(Path().rglob("*.png")))
    DRAW_ROWS(Path("grid.png"), dict.fromkeys(state["classes"], torch.zeros(2, 3, 8, 8).byte()))

def test_a_preview_names_16_classes_and_one_held_out_whole_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(18):                 # a colour for each class
        fill(Path("data", "train" if i < 17 else "val", f"{i:02}"), ["a.png"], (14 * i, 0, 99))
    monkeypatch.setattr(vqldm, "draw_preview", DRAW_PREVIEW)
    rows = recorded(monkeypatch, vqldm, "draw_rows")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "images")
    assert not any(cli(*words.split()) for words in (
        "train-vq --size 32 --widths 8,8 --codes 16 --lpips off --data data --epochs 1",
        "train-ldm --T 3 --widths 8 --epochs 1", "sample --n 18 --steps 1"))
    shown = rows[0][0][1]
    assert {name: int(images[0, 0, 9, 9]) for name, images in shown.items()} == {
        f"{i:02}": 14 * i for i in range(16)}
    assert [17 in words[3] for words, _ in made] == [False] * 2

def test_a_drawing_shows_each_strip_upright_and_from_left_to_right(tmp_path):
    """Red over yellow beside green over yellow; blue comes in the second strip."""
    colours = 255 * torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    x = colours[:3].byte().view(3, 3, 1, 1).repeat(1, 1, 20, 20)
    x[:2, :, 10:] = colours[3].byte().view(3, 1, 1)
    DRAW_ROWS(tmp_path / "a.png", {"first": x[:2], "second": x[2:]})
    drawn = torch.tensor(np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))).int()
    red, green, blue, yellow = [                                        # (y, x) of their middles
        ((drawn - colour).abs().sum(2) < 99).nonzero().double().mean(0) for colour in colours]
    assert abs(red[0] - green[0]) < 2 and red[0] < yellow[0] < blue[0] and red[1] < green[1]

# ---- The report's system -----------------------------------------------------------------------
def test_the_report_preset_trains_and_samples_the_reports_system(tmp_path, monkeypatch):
    """From the command line to the metrics: settings, modules, Algorithm 2 in T steps, unguided."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vqldm, "load_lpips", lambda *a: None)
    for words in ("train-vq --preset report --size 32 --widths 8,8 --codes 16 --n-images 12 "
                  "--epochs 1", "train-ldm --preset report --T 6 --widths 8,8 --epochs 1"):
        assert cli(*words.split()) == 0
    vq, ldm = [state_of(f"runs/{kind}/last.pt") for kind in REPORT]
    for state, want in zip((vq, ldm), REPORT.values()):
        assert {name: state["config"][name] for name in want} == want
    assert REPORT["vq"]["gan_start"] == pytest.approx(8 / 30, abs=1e-3)
    model = vqldm.LatentDiffusion(ldm, CPU, nullcontext())
    for block in (*model.vqgan.decoder.up, *model.net.up):
        c = block.up.in_channels
        assert repr(block.up) == repr(nn.ConvTranspose2d(c, c, 4, stride=2, padding=1))
    assert model.classes == ["images"] and not any("label" in name for name in ldm["ema"])
    walks = recorded(monkeypatch, vqldm.Diffusion, "sample")
    for words in ("sample --n 3", "evaluate --n 3"):
        assert cli(*words.split()) == 0
    assert [words[3:5] for words, _ in walks] == [(6, "ddpm")] * 2
    made = list(Path("runs/samples/images").glob("0*.png"))
    assert len(made) == 3 and Path("runs/ldm/metrics.json").exists()

@pytest.mark.parametrize("typed, want", [("", (3, "ddpm", 1.5)), (
    "--sampler ddim --steps 2 --guidance 4", (2, "ddim", 4))])
def test_sample_and_evaluate_follow_what_the_training_recorded_unless_it_is_typed(
        trained, tmp_path, monkeypatch, typed, want):
    """And evaluate's samples are of the classes in the trained proportion: here all of one."""
    state = state_of("runs/ldm/last.pt")
    state["config"].update(sampler="ddpm", steps=3, guidance=1.5)
    state["class_counts"] = torch.tensor([1, 10**6, 0, 0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vqldm, "load_lpips", lambda *a: None)
    torch.save(state, "one.pt")
    walks = recorded(monkeypatch, vqldm.Diffusion, "sample")
    guides = recorded(monkeypatch, vqldm, "guided")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "images")
    for command in ("sample --out out --n 3", "evaluate --n 8"):
        assert cli(*command.split(), "--ckpt", "one.pt", *typed.split()) == 0
    assert [(*words[3:5], guide[3]) for (words, _), (guide, _) in zip(walks, guides)] == [want] * 2
    assert made[1][0][3].tolist() == [1] * 4

# ---- C. Keeping a run --------------------------------------------------------------------------
STAGES = {"vq": ("train-vq --lpips off --device cpu --size 32 --widths 8,8 --codes 16 --epochs 3 "
                 "--data photos --gan-start .4").split(),
          "ldm": ("train-ldm --device cpu --T 3 --widths 8 --batch-size 8 --epochs 3 "
                  "--vq calm/vq").split()}

@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """Both stages, undisturbed, fourteen steps each, on red photographs; blue ones are held out."""
    folder = tmp_path_factory.mktemp("stopped")
    fill(folder / "photos/train", [f"{i}.png" for i in range(36)], (200, 120, 90))
    fill(folder / "photos/val", [f"{i}.png" for i in range(12)], (90, 120, 200))
    with pytest.MonkeyPatch.context() as patch:
        pictures(patch)
        patch.chdir(folder)
        looks = recorded(patch, vqldm, "reconstruct")
        losses = recorded(patch, vqldm.Diffusion, "loss")
        drawn = recorded(patch, vqldm, "draw_rows")
        assert all(cli(*words, "--out", f"calm/{stage}") == 0 for stage, words in STAGES.items())
    return folder, looks, [words for words, loss in losses if not loss.requires_grad], drawn

def blue(images):                       # uint8 (n,3,H,W): how many of them?
    return int((images[:, 2].float().mean((1, 2)) > images[:, 0].float().mean((1, 2))).sum())

def test_looks_measure_the_held_out_images_and_no_other(calm, capsys):
    assert len(calm[1]) == 10 and all(blue(words[1]) == 12 for words, _ in calm[1])
    pairs = [rows for (path, rows), _ in calm[3] if path.name.startswith("recon_epoch")]
    for rows, (words, (_, copies)) in zip(pairs, calm[1], strict=True):
        assert list(rows) == ["original", "reconstruction"]
        assert same(rows, {"original": words[1], "reconstruction": copies})
    state = state_of("calm/ldm/last.pt")
    model = vqldm.LatentDiffusion(state, CPU, nullcontext())
    images = vqldm.Images("photos", model.vq_cfg, Path("calm/cache"))
    k = model.vqgan.encode(vqldm.to_float(images.rows(images.val)))
    want = vqldm.standardise(model.vqgan.codebook.lookup(k), model.scale)
    for _, _, z0, *_ in calm[2]:
        assert (z0 - want).abs().mean() < 0.1 * want.abs().mean() and len(z0) == 12
    net = calm[2][-1][1].state_dict()
    assert same(net, state["ema"]) and not same(net, state["model"])    # what samples is measured
    late = types.SimpleNamespace(looks=0, log=[], step=0, save=list, fraction_done=float,
                                 seconds=lambda: 601)
    late.looks_due = lambda: vqldm.Run.looks_due(late)
    assert vqldm.Run.begin_look(late) and not vqldm.Run.begin_look(late)    # each ten minutes, too
    for name, bad in ("latent_std", 2), ("latent_std", 0.5), ("codes_used_percent", 9), ("psnr", 9):
        vqldm.Run.end_look(late, {name: bad})
    assert capsys.readouterr().out.count("WARNING") == 3

@POSIX
@pytest.mark.parametrize("words, n", [("", 6), ("--data photos", 6), ("--data ../{}/photos/.", 6), (
    "--data link", 6), ("--data ~/photos", 6), ("--n 4 --out o/e", 4), ("--data new", 5)])
def test_evaluate_takes_only_held_out_images_of_the_training_folder(calm, monkeypatch, words, n):
    monkeypatch.setenv("HOME", str(calm[0]))
    monkeypatch.setattr(vqldm, "load_lpips", lambda *a: blurred)
    monkeypatch.setattr(vqldm, "features", lambda lpips, images: images.flatten(1).double())
    for folder in ("new", "o/e"):
        fill(Path(folder), [f"{i}.png" for i in range(10)])
    if not Path("link").exists():
        Path("link").symlink_to("photos")
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    assert cli("evaluate", "--ckpt", "calm/ldm", *words.format(calm[0].name).split()) == 0
    half, other = (words[1] for words, _ in calls)      # one is measured, one is for reference
    assert blue(half) == blue(other) == len(half) == len(other) == n
    assert len(torch.cat([half, other]).unique(dim=0)) == 2 * n
    assert ("o/e" in words) <= Path("o/cache").is_dir()         # where it may write

def test_what_evaluate_and_resume_would_get_wrong_is_refused(calm, monkeypatch, refused):
    assert "a folder" in refused("evaluate", "--data", "")      # not the folder that we are in
    assert "unseen" in refused(*"evaluate --ckpt calm/vq --data photos/train".split())
    hook(monkeypatch, vqldm.Images, "__init__",
         after=lambda _, images, *a: vars(images).update(classes=["other"]))
    assert "classes" in refused(*STAGES["ldm"], "--resume", "--out", "calm/ldm")
    monkeypatch.setattr(vqldm, "next_rows", None)       # what cannot be written: before any step
    assert "File exists" in refused(*STAGES["vq"], "--out", "photos/train/15.png")

def test_after_an_interrupt_no_more_images_are_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = recorded(monkeypatch, vqldm, "synthetic")
    def interrupt(*a):
        if len(read) == 3:
            signal.raise_signal(signal.SIGINT)
    hook(monkeypatch, vqldm, "synthetic", interrupt)
    assert cli(*"train-vq --n-images 400 --out new".split()) == 130 and len(read) < 200

class Code:                             # pickled, this is an order to make a folder
    def __reduce__(self):
        return os.mkdir, ("trace",)

BROKEN = {                              # what the file holds, made from the state of a whole one
    "cut": None, "empty": lambda s: b"", "text": lambda s: b"hello", "a list": lambda s: [1, 2],
    "code": lambda s: dict(s, more=Code()), "foreign": lambda s: dict(weights=s["model"]),
    "alien": lambda s: dict(s, config=dict(s["config"], beyond=1)),
    "widths": lambda s: dict(s, config=dict(s["config"], widths=(40,)))}
NEEDED = {"sample --out out --ckpt bad": "kind config vq ema guide scale classes seen",
          "train-vq --epochs 3 --resume --out bad": "kind config model step log adam seen"}

@pytest.mark.parametrize("words, how", [(words, how) for words, parts in NEEDED.items()
                                        for how in (*BROKEN, *parts.split())])
def test_a_checkpoint_not_ours_or_not_whole_is_refused_and_runs_no_code(
        trained, tmp_path, monkeypatch, refused, words, how):
    whole = trained[0] / ("runs/vq/last.pt" if "vq" in words else "runs/ldm/last.pt")
    less = {name: part for name, part in state_of(whole).items() if name != how}
    content = whole.read_bytes()[:-5000] if how == "cut" else BROKEN.get(how, dict)(less)
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    if isinstance(content, bytes):
        Path("bad/last.pt").write_bytes(content)
    else:
        torch.save(content, "bad/last.pt")
    refused(*words.split())
    assert not Path("trace").exists() and not Path("out").exists()

def test_a_run_is_not_touched_by_one_that_was_not_meant_for_it(trained, refused):
    before = {path: path.read_bytes() for path in Path("runs").glob("*/*.*")}
    for words in ("train-vq --preset tiny", "train-ldm --preset tiny"):
        assert re.search("--resume.*--overwrite", refused(*words.split()))
    told = refused(*"train-vq --resume --codes 32 --size 32 --seed 1 --lr .001".split())
    assert "--codes was 64" in told and "--seed was 0" in told and not re.search("size|lr", told)
    assert "runs/samples" in refused(*"sample --out runs/samples".split())
    assert vqldm.open_run(vqldm.VQConfig(out="./runs/vq"), {}, True, False)[0].out == "./runs/vq"
    assert before == {path: path.read_bytes() for path in Path("runs").glob("*/*.*")}

def same(a, b):                         # bit for bit
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)

def assert_same_run(a, b):              # in all but place and time
    one, two = [state_of(Path(folder, "last.pt")) for folder in (a, b)]
    for state in (one, two):
        state["config"].update(out="", minutes=0, seconds=state.pop("seconds") * 0)
    assert [part for part in one.keys() | two.keys() if not same(one[part], two[part])] == []
    assert Path(a, "log.csv").read_bytes() == Path(b, "log.csv").read_bytes()

@pytest.mark.parametrize("stage, stop, number", [
    ("vq", 0, signal.SIGINT), ("vq", 5, signal.SIGTERM), ("vq", 11, signal.SIGINT), ("vq", -1, 0),
    ("ldm", 2, signal.SIGINT), ("ldm", 9, signal.SIGTERM)])
def test_stopped_and_resumed_is_bit_for_bit_the_undisturbed_run(
        calm, tmp_path, monkeypatch, capsys, stage, stop, number):
    now, (first, then) = [], ([], []) if number else (["--minutes", 1e-9], ["--epochs", 3])
    def ask(n, step, *a):
        if step == stop:
            signal.raise_signal(number)
            now.append(signal.getsignal(signal.SIGINT))         # a second one ends it
    with monkeypatch.context() as patch:
        hook(patch, vqldm, "next_rows", ask)
        assert cli(*STAGES[stage], "--out", tmp_path, *first) == (number and 128 + number)
    assert number == 0 or "--resume" in capsys.readouterr().out and now == [signal.SIG_DFL]
    assert state_of(tmp_path / "last.pt")["step"] == stop + 1
    assert cli(STAGES[stage][0], "--resume", "--out", tmp_path, *then) == 0
    assert_same_run(f"calm/{stage}", tmp_path)

def test_unused_codes_restart_every_50_steps_to_the_end(calm, tmp_path, monkeypatch):
    """Steps 345 to 355 of a run are reached at once: by a checkpoint that says so."""
    (tmp_path / "vq").mkdir()
    torch.save({**state_of("calm/vq/last.pt"), "step": 345}, tmp_path / "vq/last.pt")
    keys, key = recorded(monkeypatch, vqldm, "rng"), (0, "restart", 349)
    calls = recorded(monkeypatch, vqldm.Codebook, "restart_unused")
    assert cli("train-vq", "--resume", "--epochs", 79, "--out", tmp_path / "vq") == 0
    assert len(calls) == 1 and sum(words == key for words, _ in keys) == 1

def test_a_finished_run_stays_may_grow_and_can_be_overwritten(calm, tmp_path, monkeypatch):
    bars = recorded(monkeypatch, vqldm, "bar")
    monkeypatch.setattr("csv.DictWriter", Mock(side_effect=PermissionError))     # open in Excel
    shutil.copytree("calm/ldm", out := tmp_path / "ldm")
    for name in ("samples_epoch_007.png", "mine.png", "evaluate.png", "metrics.json"):
        (out / name).touch()
    old = state_of("calm/ldm/last.pt")
    for mode, epochs, step in (("--resume", 3, 14), ("--resume", 4, 18), ("--overwrite", 3, 14)):
        assert cli(*STAGES["ldm"], mode, "--epochs", epochs, "--out", out) == 0
        new = state_of(out / "last.pt")
        assert new["step"] == step and same(new["guide"], old["guide"])
        assert same(new["ema"], old["ema"]) == (epochs == 3)
        assert mode == "--overwrite" or new["seconds"] >= old["seconds"]
    assert [path.name for path in [*out.glob("*.png"), *out.glob("*.json")]] == ["mine.png"]
    assert cli(*STAGES["ldm"], "--overwrite", "--schedule", "x", "--out", out) == 2
    assert state_of(out / "last.pt")["step"] == 14      # what cannot begin overwrites nothing
    assert [words[2] for words, _ in bars if words[1] == "training"] == [0, 4, 14]  # steps to do

def test_a_renaming_waits_for_who_reads_the_old_file(tmp_path, monkeypatch):    # as on Windows
    rename = Mock(side_effect=[PermissionError, PermissionError, None])
    monkeypatch.setattr(os, "replace", rename)
    vqldm.write_whole(tmp_path / "a", lambda f: f.write(b"abc"))
    assert rename.call_count == 3

SCRIPT = """
import os, signal, sys, vqldm, torch, torch.distributed as dist
torch.set_num_threads(1)
for name in [name for name in dir(vqldm) if name.startswith("draw_")]: setattr(vqldm, name, print)
"""
KILLED = SCRIPT + """
sync, left = os.fsync, iter(range(8))
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL) if next(left, 8) == 8 else sync(fd)
vqldm.main(sys.argv[1].split())
"""
TWO = SCRIPT + """
vqldm.pick_device = lambda cfg: (torch.device("cpu"), torch.autocast("cpu", enabled=False))
start, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda backend: dist.is_initialized() or start(backend)
dist.destroy_process_group = lambda: None
for words in sys.argv[1:]: vqldm.main(words.split())
leave()
"""

def run_python(folder, code, *words, launch=(), **env):
    (folder / "script.py").write_text(code, encoding="utf8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **env}
    return subprocess.run([sys.executable, *launch, folder / "script.py", *words], env=env,
                          text=True, capture_output=True, timeout=600)

@POSIX
def test_killed_while_it_saves_and_resumed_is_the_undisturbed_run(calm, tmp_path):
    words = [*STAGES["vq"], "--out", str(tmp_path / "vq")]
    done = run_python(tmp_path, KILLED, " ".join(words), PYTHONUNBUFFERED="")
    assert done.returncode == -signal.SIGKILL and "held" in done.stdout[-300:]      # told at once
    assert len(list((tmp_path / "vq").glob(".*.tmp"))) == 1
    assert cli(*words, "--resume") == 0
    assert_same_run("calm/vq", tmp_path / "vq")

@POSIX
def test_two_processes_end_with_the_weights_of_one(calm, tmp_path, monkeypatch):
    more = "--muon-lr 0 --data synthetic --n-images 40 --gan-start 0 --d-lr .01 --epochs 1 --out"
    words = [" ".join([*STAGES["vq"], more, f"{tmp_path}/2/vq"]),
             " ".join([*STAGES["ldm"], "--balance", "--epochs 1 --out", f"{tmp_path}/2/ldm"])]
    done = run_python(tmp_path, TWO, *words, launch=(       # without Muon: it enlarges rounding
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(vqldm, "pick_device", lambda cfg: (CPU, nullcontext()))
    for stage, text in zip(STAGES, words):
        assert cli(*text.split(), "--out", tmp_path / "1" / stage) == 0
        one, two = (state_of(tmp_path / n / stage / "last.pt") for n in "12")
        for part in {"model", "disc", "ema", "guide"} & one.keys():
            for name in one[part].keys() - {"codebook.wins"}:
                a, b = one[part][name], two[part][name]
                assert (a - b).norm() <= 1e-3 * a.norm() + 1e-5, (part, name)

@pytest.mark.parametrize("units", [True, False])
def test_products_are_in_bf16_where_the_processor_has_units_for_it(monkeypatch, units):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: units)
    with vqldm.pick_device(vqldm.VQConfig(device="cpu"))[1]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if units else torch.float32)

def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    did = []
    for place, name in (("torch.cuda", "set_device"), ("torch.distributed", "init_process_group")):
        monkeypatch.setattr(f"{place}.{name}", did.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(os, "environ", dict(os.environ, TORCHELASTIC_RUN_ID="1", LOCAL_RANK="1"))
    assert cli("--help") == 0 and did == ["cpu:gloo,cuda:nccl", 1]

def test_no_process_leaves_before_the_first_has_saved(calm, tmp_path, monkeypatch, capsys):
    """torchrun ends all as soon as one has failed: a signal to the second is to lose nothing."""
    did, out = [], tmp_path / "a b"
    hook(monkeypatch, vqldm.Run, "save", after=lambda *a: did.append("save"))
    hook(monkeypatch, vqldm, "mean_over_processes", after=lambda *a: did.append("meet"))
    out.mkdir()
    (out / "metrics.json").touch()                      # somebody's
    assert cli(*STAGES["ldm"], "--out", out) == 0 and did[-2:] == ["save", "meet"]
    assert (out / "metrics.json").exists() and f"--ckpt '{out}'" in capsys.readouterr().out
    assert [*map(signal.getsignal, (2, 15))] == [signal.default_int_handler, signal.SIG_DFL]
    monkeypatch.setattr(vqldm, "rank", lambda: 1)
    vqldm.Run.save(None)                                # writes nothing

@pytest.mark.parametrize("stage, name", [("vq", "augment"), ("ldm", "standardise")])
def test_bad_batches_are_skipped_and_five_in_a_row_end_the_run(
        calm, tmp_path, monkeypatch, capsys, refused, stage, name):
    now, bad, make = [-1], {3, 6, 7, 8, 9}, getattr(vqldm, name)
    hook(monkeypatch, vqldm, "next_rows", lambda n, step, *a: now.append(step))
    monkeypatch.setattr(vqldm, name, lambda *a: make(*a) * (float("nan") if now[-1] in bad else 1))
    assert cli(*STAGES[stage], "--out", tmp_path / "a") == 0
    assert len(re.findall(r"step \d+ is skipped", capsys.readouterr().out)) == 5
    state = state_of(tmp_path / "a/last.pt")
    assert all(p.isfinite().all() for p in state["model"].values()) and state["step"] == 14
    now[:], bad = [-1], {5, *bad}
    assert "--lr" in refused(*STAGES[stage], "--out", tmp_path / "b")
    assert state_of(tmp_path / "b/last.pt")["step"] == 5

def test_a_bad_gradient_of_the_discriminator_is_not_stepped_along(calm, tmp_path, monkeypatch):
    hinge, turn = vqldm.hinge_loss, itertools.count()
    monkeypatch.setattr(vqldm, "hinge_loss", lambda *a: hinge(*a) / (0 if next(turn) == 1 else 1))
    assert cli(*STAGES["vq"], "--out", tmp_path) == 0 and next(turn) > 5
    assert all(p.isfinite().all() for p in state_of(tmp_path / "last.pt")["disc"].values())

@pytest.mark.parametrize("told, name, spoil", [
    pytest.param("No space left", "open", lambda path, mode: open("/dev/full", mode), marks=POSIX),
    ("out of memory", "augment", lambda *a: torch.empty(2**55))])
def test_a_full_disk_or_memory_is_one_sentence_and_harms_no_checkpoint(
        calm, tmp_path, monkeypatch, refused, told, name, spoil):
    shutil.copytree("calm/vq", out := tmp_path / "vq")
    monkeypatch.setattr(vqldm, name, spoil, raising=False)
    assert told in refused(*"train-vq --resume --epochs 4 --out".split(), out)
    assert (out / "last.pt").read_bytes() == Path("calm/vq/last.pt").read_bytes()
    assert not list(out.glob(".*"))                 # no half of one lies beside it

def test_without_lpips_a_run_goes_on_and_says_so(calm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lpips.LPIPS", lambda **how: 1 / 0)
    assert cli(*STAGES["vq"], "--out", tmp_path / "vq", "--lpips", "auto") == 0
    told = capsys.readouterr().out.splitlines()
    assert re.search("no LPIPS.*/checkpoints", "".join(told[:5])) and "LPIPS" in "".join(told[-3:])
    assert cli("evaluate", "--ckpt", tmp_path / "vq") == 0
    assert ["lpips" in path.read_text() for path in (tmp_path / "vq").glob("*.*s*")] == [False] * 2

# ---- After training: what was trained on, patients, copies, use from Python ----------------------
def moved(folder):                      # each way to change a folder, and where its images are then
    folder.rename(folder.parent / "elsewhere")
    return folder.parent / "elsewhere"
def tabled(folder):
    (folder / "metadata.csv").write_text("isic_id,lesion_id\n" + "".join(
        f"{i},{i % 9}\n" for i in range(36)))
    return folder
def sorted_out(folder):
    (folder / "test").mkdir()
    for i in range(36):
        (folder / f"{i}.png").rename(folder / ("test" if i % 3 else "") / f"{i}.png")
    return folder

@pytest.mark.parametrize("change", [moved, tabled, sorted_out])
def test_what_was_trained_on_is_never_measured_on_however_the_folder_changes(
        tmp_path, monkeypatch, capsys, change):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vqldm, "load_lpips", lambda *a: None)
    folder = fill(tmp_path / "photos", [f"{i}.png" for i in range(36)], (200, 0, 0))
    few = "--size 32 --widths 8,8 --codes 16 --epochs 1"
    assert cli(*f"train-vq --data {folder} {few}".split()) == 0
    cfg = vqldm.VQConfig(**state_of("runs/vq/last.pt")["config"])
    images = vqldm.Images(str(folder), cfg, tmp_path / "cache")
    old, unseen = images.rows(images.train), len(images.val)
    folder = change(folder)
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    status = cli("evaluate", "--ckpt", "runs/vq", "--data", folder)
    assert f"{36 - unseen} of these images were trained on" in capsys.readouterr().out
    assert status == (0 if unseen > 3 else 2)
    for (_, real, *_), _ in calls:
        assert len(torch.cat([real, old]).unique(dim=0)) == len(real) + len(old)
    if change is not moved:             # stage 2 trains on the same images, and says what is new
        seen = state_of("runs/vq/last.pt")["seen"]
        again = vqldm.Images(str(folder), cfg, tmp_path / "cache", seen)
        assert torch.isin(seen, again.marks[again.train]).all()
        assert ("WARNING" in capsys.readouterr().out) == (len(again.train) > len(seen))

def test_patients_and_lesions_stay_on_one_side_in_any_order_of_the_table(tmp_path, load):
    """A lesion of whose photographs only some name a patient follows that patient."""
    fill(tmp_path / "isic", [f"{i:03}.png" for i in range(150)])
    def person(i):                      # photographs 0-49 name patients, 50-99 lesions, others none
        return (f"P{i // 2 % 9}" if i % 2 == 0 else "", f"L{i // 2}") if i < 50 else (
            "", f"L{i // 5}" if i < 100 else "")
    rows, splits = [f"{i:03},{','.join(person(i))}\n" for i in range(150)], []
    for order in (rows, rows[::-1]):
        (tmp_path / "isic/any.csv").write_text("image_name,patient_id,lesion_id\n" + "".join(order))
        splits.append(load(tmp_path / "isic").val)
    images = load(tmp_path / "isic")
    side = torch.zeros(150).index_fill(0, images.val, 1)
    groups = [[i for i in range(50) if i // 2 % 9 == p] for p in range(9)]
    groups += [[i for i in range(50, 100) if i // 5 == lesion] for lesion in range(10, 20)]
    assert torch.equal(*splits) and all(len(side[group].unique()) == 1 for group in groups)
    assert 3 < side[100:].sum() < 15

@pytest.mark.parametrize("text, want", [
    ("ISIC_ID ; DX\n7.PNG;scar\n8;mole", "scar"), ("image\tMEL\tNV\n7\t0.0\t1.0", "nv"),
    ("image_name,diagnosis,target\n7,,1\n", "1"), ("name,dx\n7,scar", None)])
def test_tables_of_other_making_are_read_and_one_that_fits_nothing_is_a_warning(
        tmp_path, load, capsys, text, want):
    fill(tmp_path / "photos", ["7.png", "8.png"])
    (tmp_path / "photos/labels.csv").write_text(text)
    images, told = load(tmp_path / "photos"), capsys.readouterr().out
    assert images.classes[images.labels[0]] == (want or "images")
    assert ("WARNING" in told) == (want is None) and (want or "name" in told)

def test_one_name_in_many_folders_is_split_by_folder_and_licences_are_told(tmp_path, load, capsys):
    for i in range(60):
        fill(tmp_path / f"photos/{i}", ["derm.png"], (i, 0, 0))
    (tmp_path / "photos/m.csv").write_text("isic_id,copyright_license\nderm,CC-0\n")
    images = load(tmp_path / "photos")
    assert 1 < len(images.val) < 20 and "('CC-0', 1)" in capsys.readouterr().out

@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(path.read_bytes()[:-9]),
                                  lambda path: path.write_bytes(b""),
                                  lambda path: torch.save([1], path)])
def test_a_damaged_cache_is_made_again(tmp_path, load, harm):
    want = load(fill(tmp_path / "photos", ["a.png", "b.png"])).rows(torch.arange(2)).clone()
    (path,) = (tmp_path / "cache").glob("*.pt")
    harm(path)
    assert torch.equal(load(tmp_path / "photos").rows(torch.arange(2)), want)

def test_a_giant_image_is_passed_over_by_name(tmp_path, load, capsys):
    fill(tmp_path / "photos", [f"{i}.png" for i in range(5)])
    Image.new("1", (12_000, 12_000)).save(tmp_path / "photos/giant.png")
    assert len(load(tmp_path / "photos").names) == 5 and "giant.png" in capsys.readouterr().out

def test_auto_takes_the_cpu_where_an_accelerator_only_seems_to_be_there(monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **how: "meta")
    assert vqldm.pick_device(vqldm.Settings())[0] == CPU
    assert "WARNING meta" in capsys.readouterr().out
    with pytest.raises(UserError, match="--device"):
        vqldm.pick_device(vqldm.Settings(device="meta"))

def test_near_copies_are_the_samples_nearer_than_chance(tmp_path):
    known, unseen, others = (torch.randint(256, (n, 3, 32, 32), generator=rng(n)).byte()
                             for n in (200, 201, 202))
    for samples, low, high in ((known, 100, 100), (others, 0, 5), (unseen, 0.4, 1.6)):
        assert low <= vqldm.near_copies(samples, unseen, known.split(64)) <= high

def test_samples_are_written_as_they_are_made_and_a_bad_place_shows_first(
        trained, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "images")
    ckpt = ("--ckpt", trained[0] / "runs/ldm", "--steps", "1")
    (tmp_path / "file").touch()
    assert "file" in refused("sample", *ckpt, "--out", "file/out") and not made
    def stop(*a):
        assert len(list((tmp_path / "out").rglob("*.png"))) == 32 * len(made)
        if len(made) == 1:
            raise KeyboardInterrupt
    hook(monkeypatch, vqldm.LatentDiffusion, "images", stop)
    assert cli("sample", *ckpt, "--n", 40, "--out", "out") == 130
    assert len(list((tmp_path / "out").rglob("0*.png"))) == 32      # nothing made is lost

def test_evaluate_writes_folders_of_equal_size_into_a_new_place(
        trained, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(vqldm, "load_lpips", lambda *a: None)
    (tmp_path / "e").mkdir()
    words = ("evaluate", "--ckpt", "runs/ldm", "--out", tmp_path / "e", "--images", tmp_path / "i")
    assert cli(*words) == 0
    found = {folder.name: sorted(folder.iterdir()) for folder in (tmp_path / "i").iterdir()}
    assert set(found) == {"real", "recon", "samples"}
    assert {len(files) for files in found.values()} == {4}
    for files in found.values():        # by these suffixes torch-fidelity and clean-fid search
        assert all(path.suffix == ".png" and Image.open(path).size == (32, 32) for path in files)
    assert "--images" in refused(*words)

def test_resume_by_another_version_of_the_file_says_so(calm, tmp_path, monkeypatch, capsys):
    shutil.copytree("calm/vq", tmp_path / "vq")
    for code in (vqldm.code_checksum(), 7):
        monkeypatch.setattr(vqldm, "code_checksum", lambda code=code: code)
        assert cli(*STAGES["vq"], "--resume", "--out", tmp_path / "vq") == 0
        assert ("another version" in capsys.readouterr().out) == (code == 7)

def test_curves_show_training_beside_held_out_values(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    seen, legend = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda ax, **how: seen.append(legend(ax, **how)))
    log = [{"step": 1, "mse": 2.0, "d_real": 0, "d_fake": -1}, {"step": 2, "held_mse": 1.0, "x": 3}]
    DRAW_CURVES(tmp_path / "curves.png", log)
    texts = [[text.get_text() for text in box.get_texts()] for box in seen]
    assert texts == [["mse", "held_mse"], ["d_real", "d_fake"]]

def test_the_readmes_python_runs_as_it_stands(trained):
    text = (HERE / "README.md").read_text(encoding="utf8")
    code, there = re.search(r"```python\n(.*?)```", text, re.S)[1], {}
    exec(code, there)
    assert there["images"].shape == there["copies"].shape == (4, 3, 32, 32)
    assert there["k"].shape == (4, 8, 8) and code.count("\n") <= 10

# ---- G. Command line ---------------------------------------------------------------------------
MISTAKES = {        # the first word of each stands in its sentence
    "train-vq": "--epoch 3|--batchsize=4|5|--size|--size 1.5|--size 40|--size 16|--widths 16,x|"
    "--size 48 --widths 8,8,8,8,8|--widths 16,0|--lr nan|--lr -1|--minutes inf|--batch-size -8|"
    "--batch-size 8 --n-images 8|--preset huge|--data nowhere|--data empty|--data held|--device "
    "cuda:77|--device abacus|--lpips squeezed|--overwrite --resume|--resume",
    "train-ldm": "--vq nowhere|--vq {ldm}|--widths 8,8,8,8 --vq {vq}|--target x0 --vq {vq}|"
    "--schedule quadratic --vq {vq}|--T 0",
    "sample --ckpt {ldm}": "--sampler dpm|--class wart|--guidance x|--steps 0|"
    "--n 0|--ckpt {vq}|--ckpt empty",
    "evaluate": "--ckpt nowhere|--data nowhere --ckpt {ldm}|--data empty --ckpt {vq}|--n 0|"
    "--n 1 --ckpt {vq}",
    "dream": "dream"}

@pytest.mark.parametrize("command, mistake", [(command, mistake) for command in MISTAKES
                                              for mistake in MISTAKES[command].split("|")])
def test_every_mistake_is_one_sentence_and_nothing_is_written(
        trained, tmp_path, monkeypatch, refused, command, mistake):
    blind_lpips(monkeypatch)
    monkeypatch.chdir(tmp_path)
    fill(Path("empty"), [])
    fill(Path("held/val"), ["a.png"])                  # none to train on
    if "--batch-size 8" in mistake:                     # is a mistake only with three processes
        monkeypatch.setattr(vqldm, "world", lambda: 3)
    runs = trained[0] / "runs"
    words = f"{command} {mistake}".format(vq=runs / "vq", ldm=runs / "ldm").split()
    words[1:1] = ["--out", "out"] if command[:5] in ("train", "sampl") else []
    assert re.split("[ =]", mistake)[0] in refused(*words)
    assert {path.name for path in Path(".").iterdir()} <= {"empty", "held", "cache"}
    assert not (runs / "vq/metrics.json").exists()

@pytest.mark.parametrize("command", vqldm.COMMANDS)
def test_help_shows_every_flag_with_its_meaning_and_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert cli(command, "--help") == 0
    shown = capsys.readouterr().out
    for name, field in vqldm.COMMANDS[command][0].__dataclass_fields__.items():
        flag, default = "--" + name.strip("_").replace("_", "-"), re.escape(str(field.default))
        if not command.startswith("train") and name in ("sampler", "steps", "guidance"):
            default = "as trained"
        assert re.search(rf"^ +{flag}( [\w-]+)?\n? +\S.{{7,}} \[{default}\]$", shown, re.M), flag

@pytest.fixture()
def told(monkeypatch):                  # the settings that each command was given; it does nothing
    seen = []
    for name, (cls, _) in [*vqldm.COMMANDS.items()]:
        monkeypatch.setitem(vqldm.COMMANDS, name, (cls, lambda cfg, *a: seen.append(cfg)))
    return seen

def test_default_yields_to_preset_to_recorded_to_typed(trained, told):
    """The run under way was recorded with 80 images, tiny has 200."""
    for words in ("train-vq --out new", "train-vq --preset tiny --out new", "sample --class mole",
                  "train-vq --codes 9 --preset tiny --out new", "train-vq --resume --epochs 7",
                  "train-vq --resume", "train-vq --resume --preset tiny", "evaluate"):
        assert cli(*words.split()) == 0
    new, tiny, sample, typed, more, recorded, again, evaluate = told
    assert (vqldm.VQConfig().folder, vqldm.LDMConfig().folder) == (
        Path(vqldm.LDMConfig().vq), Path(sample.ckpt)) and evaluate.ckpt == sample.ckpt
    assert new == vqldm.VQConfig(out="new") and sample == vqldm.SampleConfig(class_="mole")
    assert (tiny.size, tiny.codes, tiny.widths, tiny.n_images) == (32, 64, (16, 32), 200)
    assert (typed.size, typed.codes) == (32, 9) and (more.n_images, more.epochs) == (80, 7)
    assert recorded == again and (again.preset, again.n_images, again.epochs) == ("tiny", 80, 1)

# ---- Words -------------------------------------------------------------------------------------
def test_every_command_in_the_readme_can_be_typed(tmp_path, monkeypatch, told):
    text = (HERE / "README.md").read_text(encoding="utf8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vqldm, "open_run", lambda cfg, *words: (cfg, None))
    monkeypatch.setattr(vqldm, "open_model", lambda cls, typed: (cls(**typed), None))
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    typed = re.findall(r"(?:python3?|torchrun .*?) +vqldm\.py +([^#\n&]+)", blocks)
    assert [words for words in typed if cli(*words.split()) != 0] == [] and text.count("\n") <= 150
    assert [words.split()[0] for words in typed[:3]] == [*vqldm.COMMANDS][:3]

def notebook():
    return json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]

@pytest.fixture(scope="session", autouse=True)
def short_form(request, tmp_path_factory):      # on the second core, beside all other tests
    if not any("notebook" in item.name for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("notebook")
    cells = notebook()
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for check, cell in zip(cells, cells[1:]):   # at the end each exercise once more, solved
        answer = re.search(r">Solution.*?```python\n(.*?)```", "".join(cell["source"]), re.S)
        code[-1:-1] = [answer[1], "".join(check["source"])] if answer else []
    code[:0] = ["import os", f"os.chdir({str(folder)!r})"]
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_python, folder, "\n".join(code), VQLDM_FAST="1", MPLBACKEND="Agg")

def test_notebook_ran_without_errors_and_runs_in_its_short_form(short_form):
    outputs = [output["output_type"] for cell in notebook() for output in cell.get("outputs", [])]
    assert "error" not in outputs and len(outputs) > 10
    assert short_form.result().returncode == 0, short_form.result().stderr[-2000:]
    assert short_form.result().stdout.count("✅ right") == 39       # as many as there are exercises
    assert (HERE / "tutorial.ipynb").stat().st_size <= 2e6
