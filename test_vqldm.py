# SPDX-License-Identifier: MIT
"""What vqldm.py promises, as tests. Each name, with its docstring, is the sentence that it proves.

The strongest laws have an oracle: where the data is a known mixture of Gaussians, the best possible
network is a formula. Stronger still are the references: both trainings, written out once more as
plainly as possible; the program must end with the same weights. No network, no GPU.
"""
import copy, functools, itertools, json, math, os, re, shutil, signal, subprocess, sys, types
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

# ---- 3. Symmetries -----------------------------------------------------------------------------
def test_augment_shows_each_image_in_the_eight_symmetries_of_the_square():
    x, turns = randn(8, 3, 5, 5), torch.arange(8)
    for image, shown in zip(x.numpy(), vqldm.augment(x, turns).numpy()):
        group = [np.rot90(a, k, (1, 2)) for a in (image, np.flip(image, 2)) for k in range(4)]
        assert sum(np.array_equal(shown, a) for a in group) == 1
    every = vqldm.augment(x[:1].expand(8, -1, -1, -1), turns)
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
    assert ("ConvTranspose2d" in repr(net.decoder)) == (upsample == "transposed")
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
    before, dead, outputs = e.detach().clone(), torch.arange(64) % 3 == 0, flat(100 + z)
    book.wins[~dead] = 1
    book.restart_unused(100 + z, rng(0))
    far, place = torch.cdist(e[dead].detach(), outputs).min(1)
    assert torch.equal(e[~dead], before[~dead]) and far.max() < 0.1 * outputs.std(0).norm()
    assert place.min() < 10 and place.max() > 61            # of 0…71: drawn from all
    assert len(e[dead].unique(dim=0)) == dead.sum() and not book.wins.any()     # no two alike
    book.restart_unused(z[:1, :, :1, :1], rng(0))
    assert e.isfinite().all()                               # a single vector has no spread
    monkeypatch.setattr(vqldm, "world", lambda: 2)          # all processes take the first's
    broadcast = Mock()
    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    book.restart_unused(z, rng(0))
    codes, source = broadcast.call_args.args
    assert codes.data_ptr() == e.data_ptr() and source == 0

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
    decoder = rough(vqldm.Decoder((8, 8), 4))
    last = Mock(wraps=decoder.last.forward)
    decoder.last.forward = last
    with bf16():
        x_hat = decoder(randn(1, 4, 4, 4))
        assert vqldm.PatchDiscriminator((8, 8))(x_hat).dtype == torch.float32
    (y,) = last.call_args.args
    want = F.conv2d(y.float(), *decoder.last.parameters(), padding=1)
    assert x_hat.dtype == torch.float32 and torch.allclose(x_hat, want, atol=1e-6)

def test_lpips_is_frozen_in_eval_mode_and_sees_images_from_minus_1_to_1(monkeypatch):
    """And passes a gradient to the image. The features are its last map's means over places."""
    blind_lpips(monkeypatch)
    torch.manual_seed(0)
    lpips = ORIGINAL.load_lpips("auto", "cpu")
    modules = list(lpips.modules())
    assert not any(m.training for m in modules) and any(isinstance(m, nn.Dropout) for m in modules)
    assert not any(p.requires_grad for p in lpips.parameters())
    x, x_hat = randn(2, 2, 3, 64, 64).requires_grad_()
    assert not lpips(x, x).any() and grads(lpips(x_hat, x).sum(), (x_hat,))[0].any()
    # Features
    u8 = (60 * x.detach().clamp(-2, 2) + 128).byte()
    large = F.interpolate(u8 / 255 * 2 - 1, (224, 224), mode="bilinear")
    want = lpips.net(lpips.scaling_layer(large))[-1].mean((2, 3))
    assert torch.allclose(vqldm.features(lpips, u8).float(), want, atol=1e-5)

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

def plain_vq(cfg, mixed):
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
            k = book.nearest(z)
            code = book.lookup(k)
            x_hat = net.decoder(z + (code - z).detach())
        mse = F.mse_loss(x_hat, x)
        rec = mse + cfg.lpips_weight * blurred(x_hat, x).mean()
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
    mixed = bf16(kind == "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        three_kinds(patch)
        pictures(patch)
        patch.setattr(vqldm, "pick_device", lambda cfg: ("cpu", mixed))
        patch.setattr(vqldm, "load_lpips", lambda wanted, device: blurred)
        patch.setattr(vqldm.Run, "seconds", lambda run: 6.0 * run.step)
        assert vqldm.train_vq(vq_cfg) == vqldm.train_ldm(cfg) == 0
    vq, ldm = [vqldm.load_checkpoint(c.out, "", kind) for c, kind in ((vq_cfg, "vq"), (cfg, "ldm"))]
    model = vqldm.LatentDiffusion(ldm, "cpu", mixed)
    return types.SimpleNamespace(
        kind=kind, mixed=mixed, vq_cfg=vq_cfg, cfg=cfg, vq=vq, ldm=ldm, model=model)

def three_kinds(patch):                 # lots hold four images each; with four classes in turn
    patch.setattr(vqldm, "LESIONS", dict(list(vqldm.LESIONS.items())[1:]))  # 0, 4… were of one

def assert_same(state, net):            # or how far off the worst are, in units of the allowed
    off = {name: float(((state[name] - p).abs() / (1e-4 + 1e-3 * p.abs())).max().detach())
           for name, p in net.named_parameters()}
    assert max(off.values()) <= 1, sorted(off.items(), key=lambda row: -row[1])[:3]

def test_reference_stage_1_ends_with_the_weights_of_the_paper_written_out(runs):
    """Learning rates, rows, symmetries, all losses and their weights, lam, what D sees, clipping,
    restarts, D's turn: one of them wrong, and some weight differs. And each gets a gradient."""
    net, disc, wins, want = plain_vq(runs.vq_cfg, runs.mixed)
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

@pytest.mark.parametrize("target", ["v", "eps"])
@pytest.mark.parametrize("schedule, S", [("linear", 50), ("cosine", 7), ("linear", 250)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_oracle_every_sampler_draws_the_data_from_the_perfect_network(sampler, schedule, S, target):
    """The data: three round clouds in the plane, so E[ε | z_t] is a formula. With it for a network
    the samples have the data's mean, and so its share of each cloud, and covariance. Two errors
    remain. Chance: 4.5 standard errors of n samples (coordinates have a std below 1, their products
    below 1.5). And finite steps: all samplers are of first order, 4/S bounds it for this data."""
    weight, spread = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.3, 0.35])
    centre = torch.tensor([[-1.0, 0.4], [1.0, 0.7], [0.6, -1.6]])
    d, n, key = Diffusion(250, schedule, target), 4000, itertools.count()
    def net(z, t):
        a = d.alpha_bar[t[0]]
        var, away = a * spread ** 2 + 1 - a, z.flatten(1)[:, None] - a.sqrt() * centre
        p = (weight.log() - var.log() - away.square().sum(2) / var / 2).softmax(1)      # (n,3)
        eps = ((1 - a).sqrt() * away * (p / var)[:, :, None]).sum(1).view_as(z)
        return eps if target == "eps" else (eps - (1 - a).sqrt() * z) / a.sqrt()
    def fresh():
        return randn(n, 2, 1, 1, key=next(key))
    *_, (z, z0_hat) = d.sample(net, fresh(), S, sampler, fresh)
    assert torch.allclose(z, z0_hat, atol=1e-4)         # no noise after the last step
    x, chance, mean = z.flatten(1), 4.5 / math.sqrt(n), weight @ centre
    cov = (centre.T * weight) @ centre - mean[:, None] * mean + weight @ spread ** 2 * torch.eye(2)
    assert (x.mean(0) - mean).abs().max() < chance + 1 / S
    assert (x.T.cov() - cov).abs().max() < 1.5 * chance + 4 / S

# ---- 9. The UNet -------------------------------------------------------------------------------
@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
def test_unet_is_down_middle_and_up_with_skips_of_the_same_size_and_hears_time_and_class(upsample):
    """emb is time, in sines of periods 2π to 2π·10,000, plus class."""
    net, z = rough(vqldm.UNet(3, (8, 12), 3, upsample)), randn(3, 3, 8, 8)
    assert ("ConvTranspose2d" in repr(net)) == (upsample == "transposed")
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
                weak = young(z, t_all)
                out = weak + cfg.guidance * (out - weak)
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
    PSNR: 10 log10(2²/mse) of each image, in [-1,1]. Perplexity: 2 codes, 3 : 1, make 4 / 3^¾."""
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

@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 9, 1, 1), (9, 1, 1, 1), (8, 16, 3, 3),
                                   (64, 4, 2, 2)])
def test_muon_keeps_the_directions_of_the_gradients_mean_and_evens_out_their_strengths(shape):
    """m <- .95 m + .05 g, and with .95 m + .05 g = U S Vᵀ a step is lr · U S' Vᵀ, where all of S'
    are near 1, though S spans a factor of 30 at first: against the SVD."""
    p, mean = nn.Parameter(randn(*shape)), 0
    muon = vqldm.Muon([p], 0.1)
    for key in range(3):
        before = p.detach().flatten(1).clone()
        u, s, v = torch.linalg.svd(randn(*shape, key=key).flatten(1), full_matrices=False)
        p.grad = (u * torch.logspace(0, -1.5, len(s)) @ v).view(shape)
        mean = 0.95 * mean + 0.05 * p.grad
        muon.step()
        u, _, v = torch.linalg.svd((0.95 * mean + 0.05 * p.grad).flatten(1), full_matrices=False)
        inner = u.T @ (before - p.detach().flatten(1)) @ v.T / 0.1
        assert 0.6 < inner.diag().min() and inner.diag().max() < 1.3
        assert torch.allclose(inner, inner.diag().diag(), atol=2e-3)

# ---- Part 2: data, commands, command line, words -------------------------------------------------
HERE, CPU = Path(vqldm.__file__).parent, torch.device("cpu")
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals, links, gloo as POSIX has them")
vqldm.build_parser = functools.cache(vqldm.build_parser)    # the dearest part of a short command
ORIGINAL = types.SimpleNamespace(**vars(vqldm))         # what at_home replaces, as it was
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
def at_home(request, monkeypatch):      # in the folder of the runs that a test asks for, no LPIPS
    pictures(monkeypatch)
    monkeypatch.setattr(vqldm, "load_lpips", lambda *a: None)
    if "runs" in request.fixturenames:
        three_kinds(monkeypatch)
    for name in {"trained", "calm"} & {*request.fixturenames}:
        monkeypatch.chdir(request.getfixturevalue(name)[0])

@pytest.fixture()
def elsewhere(at_home, tmp_path, monkeypatch):         # in an empty folder
    monkeypatch.chdir(tmp_path)
    return tmp_path

def blind_lpips(patch):
    import lpips                        # with a random trunk: enough, and without a download
    patch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))

def hook(patch, owner, name, before=lambda *a: None, after=lambda result, *a: None):
    function = getattr(owner, name)
    def call(*a, **how):
        before(*a)
        result = function(*a, **how)
        after(result, *a)
        return result
    patch.setattr(owner, name, call)

def recorded(patch, owner, name):       # -> a list that gets (arguments, result) of each call
    calls = []
    def note(result, *a):
        calls.append((a, result))
    hook(patch, owner, name, after=note)
    return calls

@pytest.fixture()
def refused(capsys):
    def call(*words):                   # -> the one sentence with which it ends, status 2
        capsys.readouterr()
        assert cli(*words) == 2
        said = capsys.readouterr().err
        assert re.fullmatch("vqldm: .+\n", said), said
        return said
    return call

# ---- A, B. Drawn lesions, a folder of images ---------------------------------------------------
def test_a_drawn_lesion_is_a_function_of_its_seed_and_number(tmp_path):
    """Also from the cache, where each seed has its own set."""
    keys = [(i, 24, seed) for seed in (0, 1) for i in range(8)]
    drawn = torch.stack([vqldm.synthetic(*key) for key in keys])
    assert torch.equal(drawn, torch.stack([vqldm.synthetic(*key) for key in keys[::-1]]).flip(0))
    assert len(drawn.unique(dim=0)) == 16 and drawn.float().flatten(1).std(1).min() > 8
    for seed, want in enumerate(drawn.split(8)):
        cfg = vqldm.VQConfig(size=24, n_images=8, seed=seed)
        assert torch.equal(vqldm.Images("synthetic", cfg, tmp_path).rows(torch.arange(8)), want)

def test_drawn_lesions_take_turns_show_their_class_and_are_held_out_alike(tmp_path):
    """Each two classes differ in the mean or the spread of some colour, by 4 standard errors."""
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
        (folder / name).parent.mkdir(exist_ok=True)
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
    im = Image.fromarray(pixels)
    im = im if wide else im.transpose(Image.Transpose.TRANSPOSE)
    im.save(fill(tmp_path / "all", []) / "a.png")
    assert (load(tmp_path / "all").rows(torch.arange(1)).int() - 128).abs().max() < 20

def test_bad_images_are_named_and_passed_over_and_other_files_not_opened(tmp_path, load, capsys):
    good = [f"{i}.png" for i in range(15)] + ["ä b.JPeG", "z.tiff"]
    folder = fill(tmp_path / "photos", [*good, "cut.jpg"], size=(200, 200))
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.new("F", (9, 9)).save(folder / "floats.tiff")         # they would be black
    Image.new("1", (12_000, 12_000)).save(folder / "giant.png")
    for name in ("text.jpg .hidden.png q-partial.jpg I_1_segmentation.png a.txt .git/x.png "
                 "grid.png trajectory.png recon_epoch_1.5.png my/runs/a.png masks/a.png "
                 "I_1_superpixels.png I_2_expert.png").split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    images, told = load(folder), capsys.readouterr().out
    assert sorted(images.names) == sorted(good) and images.classes == ["images"]
    assert "skipped 4 " in told and "text.jpg" in told and "giant.png" in told
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

@pytest.mark.parametrize("place, table, text, want", [
    ("isic", "isic/Metadata.csv", "\ufeffisic_id,diagnosis_1,diagnosis_3,dx,copyright_license\n"
     "0,Benign,Nevus,,CC-0\n1,Bad,,,CC-BY\n2,,,scar,CC-0\n3,,,,CC-0", "Nevus Bad scar images"),
    ("isic/HAM10000_images_part_1", "isic/HAM10000_metadata.csv", "image_id,dx\n0,nv", "nv"),
    ("isic", "labels.csv", "ISIC_ID ; DX\n0.PNG;scar\n1;mole", "scar mole"),
    ("isic", "isic/a.csv", "image\tMEL\tNV\n0\t0.0\t1.0\n1\t1\t0", "nv mel"),
    ("isic", "isic/a.csv", "image_name,diagnosis,target\n0,,1\n", "1"),
    ("isic", "isic/a.csv", "name,dx\n0,scar", "")])                # fits nothing: a warning
def test_tables_in_the_folder_or_beside_it_tell_the_classes(
        tmp_path, load, capsys, place, table, text, want):
    """Of any making. The first column that is filled counts, and tables add to each other. They
    tell how often each licence is given, too."""
    fill(tmp_path / place, [f"{i}.png" for i in range(4)])
    (tmp_path / table).write_text(text, encoding="utf8")
    (tmp_path / "mad.csv").write_text("isic_id,dx\n3," + "x" * 200_000)     # over csv's limit
    (tmp_path / "isic/mean.csv").write_text("isic_id,diagnosis_3\n0,")     # takes none away
    images, told = load(tmp_path / place), capsys.readouterr().out
    named = [images.classes[k] for k in images.labels]
    assert named == (want.split() + ["images"] * 4)[:4]
    assert ("WARNING" in told) == (not want)
    assert f"table {Path(table).name} names {len(want.split())} images" in told
    assert ("licences: ('CC-0', 3) ('CC-BY', 1)\n" in told) == ("CC" in text)

@POSIX
def test_images_are_decoded_once_and_again_when_they_change(tmp_path, load, monkeypatch):
    """Or what they link to, or what the folder that they are in links to."""
    folder, far = fill(tmp_path / "photos", ["a.png", "b.png"]), tmp_path / "elsewhere/target.png"
    fill(far.parent, [far.name])
    (folder / "link.png").symlink_to(far)
    (folder / "linked").symlink_to(far.parent)
    before = load(folder).rows(torch.arange(4))
    decoded = recorded(monkeypatch, vqldm, "read_image")
    for changed, differ, n in (([], [], 0), ([folder / "b.png"], [1], 4), ([far], [2, 3], 8)):
        for path in changed:
            fill(path.parent, [path.name], (200, 0, 99))
        now = load(folder).rows(torch.arange(4))
        assert [i for i in range(4) if not torch.equal(now[i], before[i])] == differ
        assert len(decoded) == n
        before = now

# ---- 11, D, E. What the commands write ---------------------------------------------------------
def draw_once(draw, path, *a):
    if not path.exists():
        draw(path, *a)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")        # the four commands ran there in a row
    with pytest.MonkeyPatch.context() as patch:
        pictures(patch, draw_once)
        blind_lpips(patch)
        patch.chdir(folder)
        for words in ("train-vq --preset tiny --lpips off --n-images 80 --epochs 1",
                      "train-ldm --preset tiny --epochs 3 --T 8", "sample --n 5 --steps 5"):
            assert cli(*words.split()) == 0
        calls = [recorded(patch, vqldm, "reconstruct"), recorded(patch, vqldm, "features"),
                 recorded(patch, vqldm.LatentDiffusion, "images")]
        assert cli("evaluate", "--n", 8, "--images", "runs/pngs") == 0
    return folder, *calls

def pixels_of(path):                    # -> uint8 (3,H,W)
    with Image.open(path) as im:
        return torch.from_numpy(np.array(im)).permute(2, 0, 1)

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

def test_evaluate_measures_each_distance_to_the_set_that_it_names_and_writes_the_images(trained):
    numbers = json.loads(Path("runs/ldm/metrics.json").read_text())
    _, (((_, real, *_), (_, copies)), ((_, other, *_), (_, perfect))), calls, made = trained
    (samples, z0), seen = made[0][1], {x.numpy().tobytes(): found for (_, x), found in calls}
    for name, images in dict(_perfect=perfect, _recon=copies, _real=other, **{"": samples}).items():
        a, b = (seen[x.numpy().tobytes()] for x in (real, images))
        assert numbers.pop("kernel" + name) == pytest.approx(vqldm.kernel_distance(a, b), rel=1e-3)
    assert numbers.pop("latent_std") == pytest.approx(float(z0.std())) and numbers.pop("n") == 4
    assert set(numbers) == set(
        "psnr mse lpips codes_used_percent perplexity near_copies_percent".split())
    # The folders are of equal size, and other tools find the images by this suffix.
    for name, images in dict(real=real, recon=copies, samples=samples).items():
        paths = sorted(Path("runs/pngs", name).iterdir())
        assert torch.equal(torch.stack([pixels_of(path) for path in paths]), images)
        assert {path.suffix for path in paths} == {".png"}

@pytest.mark.parametrize("words, labels", [
    ("--n 5", [0, 1, 2, 3, 0]), ("--n 5 --class $\\frac$/../../up --sampler ddpm", [2] * 5),
    ("--n 2", [0, 1])])
def test_sample_makes_what_it_is_asked_for(trained, elsewhere, monkeypatch, words, labels):
    """From one file alone. A class name is neither a path nor a formula. Two share a folder."""
    state = state_of(trained[0] / "runs/ldm/last.pt")
    state["classes"] = ["nevus-like, new", "/tmp/up", "$\\frac$/../../up", "_tmp_up"]
    torch.save(state, "one.pt")
    monkeypatch.setattr(vqldm, "draw_rows", ORIGINAL.draw_rows)
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "images")
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    assert cli("sample", "--ckpt", "one.pt", "--out", "a/out", "--steps", 2, *words.split()) == 0
    (_, _, numbers, label), (images, _) = made[0]
    path, shown = drawn[0][0]
    assert list(numbers) == list(range(len(labels))) and label.tolist() == labels
    assert path.name == "grid.png" and same(
        shown, {state["classes"][k]: images[label == k] for k in labels})
    for i, k in enumerate(labels):
        (path,) = Path().rglob(f"{i:05d}.png")
        assert torch.equal(pixels_of(path), images[i]) and path.parts[:2] == ("a", "out")
        assert path.parts[2] == ["nevus-like, new", "_tmp_up", "__frac________up", "_tmp_up"][k]

def test_a_preview_shows_16_classes_to_train_on_under_their_names(tmp_path, monkeypatch, load):
    for i in range(18):                 # a colour for each class
        part = "val" if i in (3, 17) else "train"
        fill(tmp_path / part / f"{i:02}", ["a.png"], (14 * i, 0, 99))
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    ORIGINAL.draw_preview("preview.png", load(tmp_path))
    path, shown = drawn[0][0]
    red = {name: int(images[0, 0, 9, 9]) for name, images in shown.items()}
    assert path == "preview.png" and red == {f"{i:02}": 14 * i for i in range(17) if i != 3}

def test_a_drawing_shows_each_strip_upright_and_from_left_to_right(tmp_path):
    """Red over yellow beside green over yellow; blue comes in the second strip."""
    colours = 255 * torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    x = colours[:3].byte().view(3, 3, 1, 1).repeat(1, 1, 20, 20)
    x[:2, :, 10:] = colours[3].byte().view(3, 1, 1)
    ORIGINAL.draw_rows(tmp_path / "a.png", {"first": x[:2], "second": x[2:]})
    drawn = torch.tensor(np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))).int()
    red, green, blue, yellow = [                                        # (y, x) of their middles
        ((drawn - colour).abs().sum(2) < 99).nonzero().double().mean(0) for colour in colours]
    assert abs(red[0] - green[0]) < 2 and red[0] < yellow[0] < blue[0] and red[1] < green[1]
    assert abs(red[1] - blue[1]) < 2                    # a shorter strip begins at the left, too

# ---- The report's system -----------------------------------------------------------------------
def test_the_report_preset_trains_and_samples_the_reports_system(elsewhere, monkeypatch, capsys):
    """From the command line to the metrics: its settings, Algorithm 2 in T steps, no classes. LPIPS
    is missing here, and all goes on without it."""
    walks = recorded(monkeypatch, vqldm.Diffusion, "sample")
    few = "--preset report --widths 8,8 --epochs 1"
    for words in (f"train-vq {few} --size 32 --codes 16 --n-images 12", f"train-ldm {few} --T 6",
                  "sample --n 3", "evaluate --n 3"):
        assert cli(*words.split()) == 0
    for kind, want in REPORT.items():
        config = state_of(f"runs/{kind}/last.pt")["config"]
        assert {name: config[name] for name in want} == want
    assert len(walks) > 2 and {words[3:5] for words, _ in walks} == {(6, "ddpm")}
    assert [path.name for path in Path("runs/samples").iterdir()] == ["images"]
    assert "lpips" not in Path("runs/ldm/metrics.json").read_text()
    assert "trained WITHOUT LPIPS" in capsys.readouterr().out

@pytest.mark.parametrize("typed, want", [("", (3, "ddpm", 1.5)), (
    "--sampler ddim --steps 2 --guidance 4", (2, "ddim", 4))])
def test_sample_and_evaluate_follow_what_the_training_recorded_unless_it_is_typed(
        trained, elsewhere, monkeypatch, typed, want):
    """And only the classes that it saw: sample takes turns, evaluate has them in proportion."""
    state = state_of(trained[0] / "runs/ldm/last.pt")
    state["config"].update(sampler="ddpm", steps=3, guidance=1.5)
    state["class_counts"] = torch.tensor([1, 10**6, 0, 0])
    torch.save(state, "one.pt")
    walks = recorded(monkeypatch, vqldm.Diffusion, "sample")
    guides = recorded(monkeypatch, vqldm, "guided")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "images")
    for command in ("sample --out out --n 3", "evaluate --n 8"):
        assert cli(*command.split(), "--ckpt", "one.pt", *typed.split()) == 0
    assert [(*words[3:5], guide[3]) for (words, _), (guide, _) in zip(walks, guides)] == [want] * 2
    assert [words[3].tolist() for words, _ in made] == [[0, 1, 0], [1] * 4]

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
        looks, drawn = [recorded(patch, vqldm, name) for name in ("reconstruct", "draw_rows")]
        for stage, words in STAGES.items():
            assert cli(*words, "--out", f"calm/{stage}") == 0
    return folder, looks, drawn

def test_looks_draw_the_held_out_images_beside_their_reconstructions(calm):
    """That they measure these, and the running mean on their latents, the references prove."""
    _, looks, drawn = calm
    pairs = [rows for (path, rows), _ in drawn if path.name.startswith("recon_epoch")]
    assert len(pairs) == len(looks) == 10
    for rows, ((_, images, *_), (_, copies)) in zip(pairs, looks):
        assert same(rows, {"original": images, "reconstruction": copies})
        assert len(images) == 12 and (images[:, 2] > images[:, 0]).float().mean() > 0.9     # blue

def test_looks_are_taken_each_ten_minutes_too_and_warn_of_what_is_not_healthy(capsys):
    late = types.SimpleNamespace(looks=0, log=[], step=0, save=list, fraction_done=float,
                                 seconds=lambda: 601)
    late.looks_due = lambda: vqldm.Run.looks_due(late)
    assert vqldm.Run.begin_look(late) and not vqldm.Run.begin_look(late)
    for name, bad in ("latent_std", 2), ("latent_std", 0.5), ("codes_used_percent", 9), ("psnr", 9):
        vqldm.Run.end_look(late, {name: bad})
    assert capsys.readouterr().out.count("WARNING") == 3

@POSIX
def test_evaluate_takes_other_images_too_and_caches_beside_its_out(calm, monkeypatch):
    fill(Path("home/new"), [f"{i}.png" for i in range(10)])
    monkeypatch.setenv("HOME", str(calm[0] / "home"))
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    Path("o/e").mkdir(parents=True)
    assert cli(*"evaluate --ckpt calm/vq --data ~/new --n 4 --out o/e".split()) == 0
    real = calls[0][0][1]
    assert len(real) == len(real.unique(dim=0)) == 4
    assert Path("o/cache").is_dir() and Path("o/e/metrics.json").exists()

def test_what_evaluate_and_resume_would_get_wrong_is_refused(calm, monkeypatch, refused):
    assert "unseen" in refused(*"evaluate --ckpt calm/vq --data photos/train".split())
    def rename(_, images, *a):
        images.classes = ["other"]
    hook(monkeypatch, vqldm.Images, "__init__", after=rename)
    assert "classes" in refused(*STAGES["ldm"], "--resume", "--out", "calm/ldm")
    monkeypatch.setattr(vqldm, "next_rows", None)       # what cannot be written: before any step
    assert "File exists" in refused(*STAGES["vq"], "--out", "photos/train/15.png")

def test_after_an_interrupt_no_more_images_are_prepared(elsewhere, monkeypatch):
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
        trained, elsewhere, refused, words, how):
    whole = trained[0] / ("runs/vq/last.pt" if "vq" in words else "runs/ldm/last.pt")
    less = {name: part for name, part in state_of(whole).items() if name != how}
    content = whole.read_bytes()[:-5000] if how == "cut" else BROKEN.get(how, dict)(less)
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
    (tmp_path / "metrics.json").touch()                         # somebody's: it stays
    def ask(n, step, *a):
        if step == stop:
            signal.raise_signal(number)
            now.append(signal.getsignal(signal.SIGINT))         # a second one ends it
    with monkeypatch.context() as patch:
        hook(patch, vqldm, "next_rows", ask)
        assert cli(*STAGES[stage], "--out", tmp_path, *first) == (number and 128 + number)
    assert number == 0 or "--resume" in capsys.readouterr().out and now == [signal.SIG_DFL]
    assert [*map(signal.getsignal, (2, 15))] == [signal.default_int_handler, signal.SIG_DFL]
    assert state_of(tmp_path / "last.pt")["step"] == stop + 1
    assert (tmp_path / "metrics.json").exists()
    assert cli(STAGES[stage][0], "--resume", "--out", tmp_path, *then) == 0
    assert_same_run(f"calm/{stage}", tmp_path)

def test_what_a_kill_while_saving_leaves_is_resumed_bit_for_bit(calm, tmp_path, monkeypatch):
    flushes, killed = itertools.count(), tmp_path / "killed"
    def copy_what_is_there(file):
        if next(flushes) == 8:
            shutil.copytree(tmp_path / "vq", killed)
    hook(monkeypatch, os, "fsync", copy_what_is_there)
    assert cli(*STAGES["vq"], "--out", tmp_path / "vq") == 0
    assert len(list(killed.glob(".*.tmp"))) == 1 and state_of(killed / "last.pt")["step"] < 14
    assert cli(*STAGES["vq"], "--out", killed, "--resume") == 0
    assert_same_run("calm/vq", killed)

def test_unused_codes_restart_every_50_steps_to_the_end(calm, tmp_path, monkeypatch):
    """Steps 345 to 355 of a run are reached at once: by a checkpoint that says so."""
    (tmp_path / "vq").mkdir()
    torch.save({**state_of("calm/vq/last.pt"), "step": 345}, tmp_path / "vq/last.pt")
    keys = recorded(monkeypatch, vqldm, "rng")
    calls = recorded(monkeypatch, vqldm.Codebook, "restart_unused")
    assert cli("train-vq", "--resume", "--epochs", 79, "--out", tmp_path / "vq") == 0
    assert len(calls) == [words for words, _ in keys].count((0, "restart", 349)) == 1

def test_a_finished_run_stays_may_grow_and_can_be_overwritten(calm, tmp_path, monkeypatch):
    bars = recorded(monkeypatch, vqldm, "bar")
    monkeypatch.setattr("csv.DictWriter", Mock(side_effect=PermissionError))     # open in Excel
    out = shutil.copytree("calm/ldm", tmp_path / "ldm")
    old = state_of("calm/ldm/last.pt")
    for mode, epochs, step in (("--resume", 3, 14), ("--resume", 4, 18), ("--overwrite", 3, 14)):
        assert cli(*STAGES["ldm"], mode, "--epochs", epochs, "--out", out) == 0
        new = state_of(out / "last.pt")
        assert new["step"] == step and same(new["guide"], old["guide"])
        assert same(new["ema"], old["ema"]) == (epochs == 3)
        assert mode == "--overwrite" or new["seconds"] >= old["seconds"]
    assert cli(*STAGES["ldm"], "--overwrite", "--schedule", "x", "--out", out) == 2
    assert state_of(out / "last.pt")["step"] == 14      # what cannot begin overwrites nothing
    assert [words[2] for words, _ in bars if words[1] == "training"] == [0, 4, 14]  # steps to do

TWO = """
import sys, vqldm, torch
for name in filter(lambda name: name.startswith("draw_"), dir(vqldm)):
    setattr(vqldm, name, print)
vqldm.pick_device = lambda cfg: (torch.device("cpu"), torch.autocast("cpu", enabled=False))
vqldm.main(sys.argv[1:])
"""

def run_python(folder, code, *words, launch=(), **env):
    (folder / "script.py").write_text(code, encoding="utf8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **env}
    return subprocess.run([sys.executable, *launch, folder / "script.py", *words], env=env,
                          text=True, capture_output=True, timeout=600)

@POSIX
def test_two_processes_end_with_the_weights_of_one(calm, tmp_path, monkeypatch):
    more = {"vq": "--muon-lr 0 --data synthetic --n-images 40 --gan-start 0 --d-lr .01 --epochs 1",
            "ldm": "--balance --epochs 1"}              # without Muon, which enlarges rounding
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    monkeypatch.setattr(vqldm, "pick_device", lambda cfg: (CPU, nullcontext()))
    for stage in STAGES:
        words = [*STAGES[stage], *more[stage].split(), "--out"]
        done = run_python(tmp_path, TWO, *words, f"{tmp_path}/2/{stage}", launch=launch)
        assert done.returncode == 0, done.stderr
        assert cli(*words, f"{tmp_path}/1/{stage}") == 0
        one, two = (state_of(tmp_path / n / stage / "last.pt") for n in "12")
        for part in {"model", "disc", "ema", "guide"} & one.keys():
            for name in one[part].keys() - {"codebook.wins"}:
                a, b = one[part][name], two[part][name]
                assert (a - b).norm() <= 1e-3 * a.norm() + 1e-5, (part, name)

def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    did = []
    for place, name in (("torch.cuda", "set_device"), ("torch.distributed", "init_process_group")):
        monkeypatch.setattr(f"{place}.{name}", did.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(os, "environ", dict(os.environ, TORCHELASTIC_RUN_ID="1", LOCAL_RANK="1"))
    assert cli("--help") == 0 and did == ["cpu:gloo,cuda:nccl", 1]

def test_no_process_leaves_before_the_first_has_saved(calm, tmp_path, monkeypatch, capsys):
    """torchrun ends all as soon as one has failed: a signal to the second is to lose nothing."""
    saves, out = recorded(monkeypatch, vqldm.Run, "save"), tmp_path / "a b"
    saved_when_they_met = []
    def note(*a):
        saved_when_they_met.append(len(saves))
    hook(monkeypatch, vqldm, "mean_over_processes", note)
    assert cli(*STAGES["ldm"], "--out", out) == 0
    assert saved_when_they_met[-2] < saved_when_they_met[-1] == len(saves)
    assert f"--ckpt '{out}'" in capsys.readouterr().out         # can be pasted into a shell
    monkeypatch.setattr(vqldm, "rank", lambda: 1)
    vqldm.Run.save(None)                                # writes nothing

@pytest.mark.parametrize("stage, name", [("vq", "augment"), ("ldm", "standardise")])
def test_bad_batches_are_skipped_and_five_in_a_row_end_the_run(
        calm, tmp_path, monkeypatch, capsys, stage, name):
    bad, make = {2, 4, 6, 7, 8, 9, 10}, getattr(vqldm, name)
    begun = recorded(monkeypatch, vqldm, "next_rows")
    def spoiled(*a):
        (_, step, *_), _ = begun[-1]
        return make(*a) * (math.nan if step in bad else 1)
    monkeypatch.setattr(vqldm, name, spoiled)
    assert cli(*STAGES[stage], "--out", tmp_path) == 2
    told, sentence = capsys.readouterr()
    assert told.count("is skipped") == len(bad) and "--lr" in sentence
    state = state_of(tmp_path / "last.pt")
    assert state["step"] == 6 and all(p.isfinite().all() for p in state["model"].values())

@pytest.mark.parametrize("told, name, spoil", [
    pytest.param("No space left", "open", lambda path, mode: open("/dev/full", mode), marks=POSIX),
    ("out of memory", "augment", lambda *a: torch.empty(2**55))])
def test_a_full_disk_or_memory_is_one_sentence_and_harms_no_checkpoint(
        calm, tmp_path, monkeypatch, refused, told, name, spoil):
    out = shutil.copytree("calm/vq", tmp_path / "vq")
    monkeypatch.setattr(vqldm, name, spoil, raising=False)
    assert told in refused(*"train-vq --resume --epochs 4 --out".split(), out)
    assert (out / "last.pt").read_bytes() == Path("calm/vq/last.pt").read_bytes()
    assert not list(out.glob(".*"))                 # no half of one lies beside it

def test_lpips_that_cannot_be_loaded_is_left_out_and_its_place_is_told(monkeypatch, capsys):
    monkeypatch.setattr("lpips.LPIPS", Mock(side_effect=OSError))
    assert ORIGINAL.load_lpips("auto", "cpu") is None
    assert re.search("no LPIPS.*/checkpoints", capsys.readouterr().out)

# ---- After training: what was trained on, patients, copies, use from Python ----------------------
def tabled(folder):                     # ways to change a folder
    rows = "".join(f"{i},{i % 9}\n" for i in range(36))
    (folder / "metadata.csv").write_text("isic_id,lesion_id\n" + rows)
def sorted_out(folder):
    (folder / "test").mkdir()
    for i in range(0, 36, 3):
        (folder / f"{i}.png").rename(folder / f"test/{i}.png")

@pytest.mark.parametrize("change", [tabled, sorted_out])
def test_what_was_trained_on_is_never_measured_on_however_the_folder_changes(
        elsewhere, monkeypatch, capsys, change):
    folder = fill(elsewhere / "photos", [f"{i}.png" for i in range(36)], (200, 0, 0))
    few = "--size 32 --widths 8,8 --codes 16 --epochs 1"
    assert cli(*f"train-vq --data {folder} {few}".split()) == 0
    state = state_of("runs/vq/last.pt")
    cfg = vqldm.VQConfig(**state["config"])
    images = vqldm.Images(str(folder), cfg, elsewhere / "cache")
    old, unseen = images.rows(images.train), len(images.val)
    change(folder)
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    assert cli("evaluate", "--ckpt", "runs/vq") == (0 if unseen > 3 else 2)
    assert f"{36 - unseen} of these images were trained on" in capsys.readouterr().out
    for (_, measured, *_), _ in calls:
        assert len(torch.cat([measured, old]).unique(dim=0)) == len(measured) + len(old)
    # Stage 2 trains on the same images, and says what is new.
    again = vqldm.Images(str(folder), cfg, elsewhere / "cache", state["seen"])
    assert torch.isin(state["seen"], again.marks[again.train]).all()
    assert ("WARNING" in capsys.readouterr().out) == (len(again.train) > len(state["seen"]))

def test_patients_and_lesions_stay_on_one_side_in_any_order_of_the_table(tmp_path, load):
    """A lesion of whose photographs only some name a patient follows that patient. Photographs
    without either, here of one name in many folders, are split one by one."""
    patient = [f"P{i // 2 % 9}" for i in range(50)] + 100 * [""]
    lesion = [f"L{i // 2}" for i in range(50)] + [f"M{i // 5}" for i in range(50)] + 50 * [""]
    rows = [f"{i:03},{patient[i] if i % 2 else ''},{lesion[i]}\n" for i in range(150)]
    names = [f"{i:03}.png" if i < 100 else f"{i}/derm.png" for i in range(150)]
    fill(tmp_path / "isic", names)
    splits = []
    for order in (rows, rows[::-1]):
        (tmp_path / "isic/any.csv").write_text("image_name,patient_id,lesion_id\n" + "".join(order))
        splits.append(load(tmp_path / "isic").val)
    held = set(splits[0].tolist())
    for group in {*patient, *lesion} - {""}:
        together = {i for i in range(150) if group in (patient[i], lesion[i])}
        assert together <= held or not together & held
    assert torch.equal(*splits) and held & {*range(50)} and held & {*range(50, 100)}
    assert 3 < len(held & {*range(100, 150)}) < 15

def test_a_cache_holds_one_size_and_is_made_again_if_it_is_damaged(tmp_path, load):
    folder, both = fill(tmp_path / "v1.0", ["a.png", "b.png"]), torch.arange(2)
    images = load(folder)
    assert len(images.train) == len(images.val) == 1            # a handful is enough
    (path,) = (tmp_path / "cache").glob("*.pt")
    torch.save([1], tmp_path / "other.pt")
    for content in (path.read_bytes()[:-9], b"", (tmp_path / "other.pt").read_bytes()):
        path.write_bytes(content)
        assert torch.equal(load(folder).rows(both), images.rows(both))
    larger = vqldm.Images(str(folder), vqldm.VQConfig(size=24), tmp_path / "cache")
    assert larger.rows(both).shape == (2, 3, 24, 24)

@pytest.mark.parametrize("units", [True, False])
def test_auto_takes_the_cpu_where_an_accelerator_only_seems_to_be_there(monkeypatch, capsys, units):
    """And there products are in bf16, if the processor has units for it."""
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **how: "meta")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: units)
    device, mixed = vqldm.pick_device(vqldm.Settings())
    with mixed:
        product = torch.ones(2, 2, device=device) @ torch.ones(2, 2)
    assert device == CPU and product.dtype == (torch.bfloat16 if units else torch.float32)
    assert "WARNING meta" in capsys.readouterr().out
    with pytest.raises(UserError, match="--device"):
        vqldm.pick_device(vqldm.Settings(device="meta"))

def test_near_copies_are_the_samples_nearer_than_chance():
    known, unseen, others = (torch.randint(256, (n, 3, 32, 32), generator=rng(n)).byte()
                             for n in (200, 201, 202))
    for samples, low, high in ((known, 100, 100), (others, 0, 5), (unseen, 0.4, 1.6)):
        assert low <= vqldm.near_copies(samples, unseen, known.split(64)) <= high

def test_samples_are_written_as_they_are_made_and_a_bad_place_shows_first(
        trained, elsewhere, monkeypatch, refused):
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "images")
    ckpt = ("--ckpt", trained[0] / "runs/ldm", "--steps", "1")
    Path("file").touch()
    assert "file" in refused("sample", *ckpt, "--out", "file/out") and not made
    def stop(*a):
        assert len(list(Path("out").rglob("*.png"))) == 32 * len(made)
        if len(made) == 1:
            raise KeyboardInterrupt
    hook(monkeypatch, vqldm.LatentDiffusion, "images", stop)
    assert cli("sample", *ckpt, "--n", 40, "--out", "out") == 130
    assert len(list(Path("out").rglob("0*.png"))) == 32      # nothing made is lost

def test_resume_by_another_version_of_the_file_says_so(trained, monkeypatch, capsys):
    for code in (vqldm.code_checksum(), 7):
        monkeypatch.setattr(vqldm, "code_checksum", lambda code=code: code)
        vqldm.open_run(vqldm.VQConfig(), {}, resume=True, overwrite=False)
        assert ("another version" in capsys.readouterr().out) == (code == 7)

def test_curves_show_training_beside_held_out_values_under_their_names(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    panels = ["mse held_mse", "lpips held_lpips", "codebook d_loss", "d_real d_fake", "lam",
              "held_perplexity", "loss held_loss", "held_latent_std"]
    names = " ".join(["step", "other", *panels]).split()
    log = [{name: i + j / 100 for i, name in enumerate(names, 1)} for j in range(3)]
    drawn = recorded(monkeypatch, Axes, "legend")
    ORIGINAL.draw_curves(tmp_path / "curves.png", log)
    lines = [drawing[0].get_lines() for drawing, _ in drawn]
    assert [" ".join(line.get_label() for line in panel) for panel in lines] == panels
    linear = [i for i, (drawing, _) in enumerate(drawn) if drawing[0].get_yscale() == "linear"]
    assert linear == [3, 5, 7]                          # logits, perplexity, std; losses are log
    for line in itertools.chain(*lines):
        assert line.get_ydata().tolist() == [row[line.get_label()] for row in log]
    ORIGINAL.draw_curves(tmp_path / "curves.png", [{"step": 1, "loss": 2.0}])   # only what is there
    assert len(drawn) == len(panels) + 1

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
    "--n 1 --ckpt {vq}|--images empty --ckpt {vq}|--data= --ckpt {vq}",
    "dream": "dream"}

@pytest.mark.parametrize("command, mistake", [(command, mistake) for command in MISTAKES
                                              for mistake in MISTAKES[command].split("|")])
def test_every_mistake_is_one_sentence_and_nothing_is_written(
        trained, elsewhere, monkeypatch, refused, command, mistake):
    blind_lpips(monkeypatch)
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
    assert sys.stdout.line_buffering            # what is sent to a file appears at once
    for name, field in vqldm.COMMANDS[command][0].__dataclass_fields__.items():
        flag, default = "--" + name.strip("_").replace("_", "-"), re.escape(str(field.default))
        if not command.startswith("train") and name in ("sampler", "steps", "guidance"):
            default = "as trained"
        assert re.search(rf"^ +{flag}( [\w-]+)?\n? +\S.{{7,}} \[{default}\]$", shown, re.M), flag

@pytest.fixture()
def told(monkeypatch):                  # the settings that each command was given; it does nothing
    seen = []
    def note(cfg, *a):
        seen.append(cfg)
    for name, (cls, _) in [*vqldm.COMMANDS.items()]:
        monkeypatch.setitem(vqldm.COMMANDS, name, (cls, note))
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
def test_every_command_in_the_readme_can_be_typed(elsewhere, monkeypatch, told):
    text = (HERE / "README.md").read_text(encoding="utf8")
    monkeypatch.setattr(vqldm, "open_run", lambda cfg, *words: (cfg, None))
    monkeypatch.setattr(vqldm, "open_model", lambda cls, typed: (cls(**typed), None))
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    typed = re.findall(r"(?:python3?|torchrun .*?) +vqldm\.py +([^#\n&]+)", blocks)
    assert [words for words in typed if cli(*words.split()) != 0] == []
    assert [words.split()[0] for words in typed[:3]] == [*vqldm.COMMANDS][:3]
    cells = json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]
    (shell,) = re.findall(r"```sh\n(.*?)```", "\n".join("".join(c["source"]) for c in cells), re.S)
    assert shell in text                                # the notebook's commands are README's

def test_readmes_tables_show_the_numbers_of_the_runs():
    """.github/results.json holds what evaluate measured, {header of the table: {row: numbers}}."""
    results = json.loads((HERE / ".github/results.json").read_text(encoding="utf8"))
    found = 0
    for table in re.findall(r"(?:^\|.*\n)+", (HERE / "README.md").read_text("utf8"), re.M):
        head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                          for line in table.splitlines()]
        for row in rows if head[0] in results else []:
            shown = [float(cell.replace(",", "").rstrip(" %")) for cell in row[1:]]
            places = [len(cell.rstrip(" %").partition(".")[2]) for cell in row[1:]]
            known = results[head[0]][row[0].split(":")[0].replace("*", "")]
            assert shown == [round(number, n) for number, n in zip(known, places)], row
            found += 1
    assert found == sum(map(len, results.values()))

def test_notebook_ran_without_errors_and_runs_in_its_short_form(tmp_path):
    path = HERE / "tutorial.ipynb"
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    outputs = [output["output_type"] for cell in cells for output in cell.get("outputs", [])]
    assert "error" not in outputs and len(outputs) > 10 and path.stat().st_size <= 2e6
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for check, cell in zip(cells, cells[1:]):   # at the end each exercise once more, solved
        answer = re.search(r">Solution.*?```python\n(.*?)```", "".join(cell["source"]), re.S)
        code[-1:-1] = [answer[1], "".join(check["source"])] if answer else []
    code[:0] = ["import os", f"os.chdir({str(tmp_path)!r})"]
    done = run_python(tmp_path, "\n".join(code), VQLDM_FAST="1", MPLBACKEND="Agg")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("✓ right") == 39           # as many as there are exercises
