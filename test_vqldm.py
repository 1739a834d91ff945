# SPDX-License-Identifier: MIT
"""What vqldm.py promises, as tests. Each name, with its docstring, is the sentence that it proves.

    python -m pytest                    all of it: 2.6 minutes on two cores; no network, no GPU
    python -m pytest -k oracle          one promise
    VQLDM_LONG=1 python -m pytest -k moment         21 kills of each stage instead of 3; =200: 198

A. Laws: the mathematics, against closed forms     B. Data: lesions, epochs, a nasty folder
C. Commands: train, sample, refuse, stop, resume   D. Command line: every flag, every mistake
E. Words: head, README and notebook say what the code does

The oracle tests are the strongest: where the data is a known mixture of Gaussians, the best
possible network is a formula. With it in place of the UNet only the sampler's own error is left.
"""
import copy
import csv
import dataclasses
import functools
import gc
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import typing
import warnings
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import vqldm
from vqldm import Codebook, Diffusion, UserError, rng

torch.set_num_threads(1)        # these tensors are small: more threads only wait for each other
HERE, CPU = Path(vqldm.__file__).parent, torch.device("cpu")

def randn(*shape, key=0):
    """Normal numbers that are the same in each run, whatever ran before."""
    return torch.randn(shape, generator=rng("test", key))

def grads(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)

def flat(z):                    # (B,d,h,w) -> (B·h·w,d)
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)

# ------------------------------------------------------------------------------------------------
# A. Laws
# ------------------------------------------------------------------------------------------------

# ---- codebook ----------------------------------------------------------------------------------

def codebook(K=32, d=4):
    book = Codebook(K, d)
    book.embedding.weight.data = randn(K, d, key="codes")
    return book, randn(2, d, 6, 6, key="z").requires_grad_(), book.embedding.weight

def excess(k, z, book):
    """Squared distance of each z to the code it got, above that to its nearest one; in float64."""
    d = (flat(z.double())[:, None] - book.embedding.weight.detach().double()).square().sum(2)
    return d.gather(1, k.flatten()[:, None])[:, 0] - d.amin(1)

def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_z():
    book, z, e = codebook()
    out, k, *_ = book(z)
    assert torch.allclose(out, e[k].permute(0, 3, 1, 2), atol=1e-6)
    out.backward(wanted := randn(*out.shape, key="wanted"))
    assert torch.equal(z.grad, wanted) and e.grad is None

def test_codebook_loss_moves_only_the_codes():
    """‖sg[z] - e_k‖²: each code is pulled to the vectors that it won, z is not."""
    book, z, e = codebook()
    _, k, loss, _ = book(z)
    loss.backward()
    k, moved = k.flatten(), e.detach()
    want = torch.zeros_like(moved).index_add(0, k, 2 * (moved[k] - flat(z)) / z.numel())
    assert z.grad is None and e.grad.any() and torch.allclose(e.grad, want, atol=1e-7)

def test_commitment_loss_moves_only_z():
    book, z, e = codebook()
    out, _, codebook_loss, loss = book(z)
    loss.backward()
    assert e.grad is None and torch.allclose(loss, codebook_loss)       # one distance, two halves
    assert torch.allclose(z.grad, 2 * (z - out).detach() / z.numel(), atol=1e-7)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_code_is_that_of_a_float64_search(dtype):
    """Also for bf16 latents under autocast, where distances in bf16 choose 5-15 % wrongly."""
    book = Codebook(512, 4)
    book.embedding.weight.data, z = randn(512, 4, key=1), randn(4, 4, 16, 16, key=2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        k, inside = book.nearest(z), book(z)[1]
    assert torch.equal(k, inside) and excess(k, z, book).max() < 1e-5

def test_codes_that_start_from_encoder_outputs_are_nearly_all_used():
    """Where z has mean 1 and std .3, the usual start around the origin leaves most codes unused."""
    K, (z, others) = 256, (1 + 0.3 * randn(16, 4, 16, 16, key=key) for key in range(2))
    book = Codebook(K, 4)
    nn.init.uniform_(book.embedding.weight, -1 / K, 1 / K)
    assert len(book.nearest(z).unique()) < 0.2 * K
    book.revive(z, torch.ones(K, dtype=torch.bool), rng(0))
    assert len(book.nearest(others).unique()) > 0.95 * K

def test_revive_never_takes_a_vector_that_is_not_finite():
    """A NaN in the first batch would spoil all codes for good."""
    book, z, e = codebook()
    before, bad = e.detach().clone(), z.detach().clone()
    bad[0] = math.nan
    book.revive(bad, torch.ones(32, dtype=torch.bool), rng(0))
    assert e.isfinite().all() and not torch.equal(e, before)
    before = e.detach().clone()
    book.revive(torch.full_like(bad, math.nan), torch.ones(32, dtype=torch.bool), rng(0))
    assert torch.equal(e, before)

def test_revive_moves_only_the_dead_codes_and_only_onto_encoder_outputs():
    book, z, e = codebook()
    k, before, dead = book.nearest(z), e.detach().clone(), torch.arange(32) % 3 == 0
    book.count(k)
    assert torch.equal(book.usage, torch.bincount(k.flatten(), minlength=32).float())
    book.revive(100 + z, dead, rng(0))
    assert torch.equal(e[~dead], before[~dead]) and not book.usage.any()
    far = torch.cdist(e[dead].detach(), flat(100 + z)).amin(1)
    assert far.max() < 0.05 * flat(z).std(0).norm() and len(e[dead].unique(dim=0)) == dead.sum()

def test_settle_shortens_outliers_and_keeps_every_nearest_code():
    """To one spacing of the codes at most; what is nearer stays where it is."""
    book, _, e = codebook(64)
    z = randn(8, 4, 8, 8) / randn(8, 1, 8, 8, key=1).abs() ** 0.7       # heavy tails
    spacing = (torch.cdist(e, e) + torch.eye(64) * 1e9).amin(1).median()
    settled, code = book.settle(z), book.lookup(book.nearest(z))
    away = (z - code).norm(dim=1, keepdim=True)
    want = code + (z - code) / away * away.clamp(max=spacing)
    assert away.max() > 5 * spacing > 0 and torch.allclose(settled, want, rtol=1e-3, atol=1e-5)
    assert excess(book.nearest(z), settled, book).max() < 1e-4

# ---- blocks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("c", range(1, 71))
def test_norm_works_for_every_width_and_treats_each_image_alone(c):
    norm, x = vqldm.Norm(c), 5 + 3 * randn(3, c, 6, 6)
    y = norm(x)
    groups = y.unflatten(1, (norm.num_groups, -1)).flatten(2)
    assert groups.mean(2).abs().max() < 1e-4 and c // norm.num_groups >= min(4, c)
    assert (groups.var(2, correction=0) - 1).abs().max() < 1e-3
    assert torch.allclose(y[:1], norm(x[:1]), atol=1e-5)

def test_residual_branches_start_as_nothing():
    """At the start a ResBlock is its shortcut, an AttentionBlock the identity, the UNet's answer 0,
    and so the first loss is about 1: it 'predicts nothing'."""
    x, emb, wider = randn(2, 8, 4, 4), randn(2, 16), vqldm.ResBlock(8, 12)
    assert torch.equal(vqldm.ResBlock(8, 8, 16)(x, emb), x)
    assert torch.equal(wider(x), wider.shortcut(x))
    assert torch.equal(vqldm.AttentionBlock(8, 2)(x), x)
    net, z0, t = vqldm.UNet(4, (8, 12), 1), randn(512, 4, 4, 4), torch.arange(512) * 1000 // 512
    loss = Diffusion(1000).loss(net, z0, t, randn(*z0.shape, key=1)).mean().detach()
    assert abs(loss - 1) < 5 * math.sqrt(2 / z0.numel())        # 5 standard errors of a mean of n²

def test_time_scales_and_shifts_what_the_second_norm_puts_out():
    """AdaGN (Dhariwal & Nichol 2021): y -> y (1 + scale) + shift, both read off the embedding."""
    torch.manual_seed(0)
    block, x, emb = vqldm.ResBlock(8, 8, 16), randn(2, 8, 4, 4), randn(2, 16)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    scale, shift = block.emb(F.silu(emb)).view(2, 2, 8, 1, 1).unbind(1)
    y = block.norm2(block.conv1(F.silu(block.norm1(x))))
    want = x + block.conv2(F.silu(y + scale * y + shift))
    assert torch.allclose(block(x, emb), want, atol=1e-4)

@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 9), (9, 1), (8, 8), (16, 144), (128, 64)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_lengths(rows, columns):
    """U S Vᵀ -> U S' Vᵀ with all of S' near 1, though S spans a factor of 30: against the SVD."""
    u, _, v = torch.linalg.svd(randn(rows, columns), full_matrices=False)
    s = torch.logspace(0, -1.5, min(rows, columns))
    inner = u.T @ vqldm.orthogonal(1e-3 * (u * s) @ v) @ v.T
    assert 0.6 < inner.diag().min() and inner.diag().max() < 1.25
    assert torch.allclose(inner, inner.diag().diag(), atol=1e-3)
    assert torch.equal(vqldm.orthogonal(torch.zeros(rows, columns)), torch.zeros(rows, columns))

def test_muon_moves_inner_kernels_by_its_law_and_all_else_as_adam_does():
    """Three steps against the law written out: m <- .95 m + .05 g, the kernel goes lr along
    orthogonal(.95 m + .05 g). Each parameter is in one group; the codes keep their own rate; with
    muon_lr 0 nothing differs from Adam."""
    net = vqldm.VQGAN((6, 10), 4, 8, 1)
    own = {net.codebook.embedding.weight: 0.3}
    twins = [copy.deepcopy(net) for _ in range(2)]
    opt = vqldm.make_optimizer(net, 1e-2, (0.9, 0.99), 0.1, own)
    plain = vqldm.make_optimizer(twins[0], 1e-2, (0.9, 0.99))
    adam = torch.optim.Adam(twins[1].parameters(), 1e-2, (0.9, 0.99))
    for group in (*opt.param_groups, *plain.param_groups):
        group["lr"] = group["initial_lr"]
    assert sorted(id(p) for g in opt.param_groups for p in g["params"]) == \
        sorted(map(id, net.parameters()))
    kernels = {name for name, p in net.named_parameters() if p.dim() == 4
               and not re.search("first|last", name)}
    want, mean = {n: p.detach().clone() for n, p in net.named_parameters()}, {}
    for step in range(3):
        for copied in (net, *twins):
            for i, p in enumerate(copied.parameters()):
                p.grad = randn(*p.shape, key=(step, i))
        for i, name in enumerate(want):
            if name in kernels:
                g = randn(*want[name].shape, key=(step, i))
                mean[name] = 0.95 * mean.get(name, 0 * g) + 0.05 * g
                m = vqldm.orthogonal((0.95 * mean[name] + 0.05 * g).flatten(1))
                want[name] -= 0.1 * max(1, m.shape[0] / m.shape[1]) ** 0.5 * m.view(g.shape)
        opt.step(), plain.step(), adam.step()
    for (name, p), a, b in zip(net.named_parameters(), *(t.parameters() for t in twins)):
        assert torch.allclose(a, b, atol=1e-6)
        if name in kernels:
            assert torch.allclose(p, want[name], atol=1e-4)
        elif name != "codebook.embedding.weight":
            assert torch.allclose(p, b, atol=1e-6)
    moved = net.codebook.embedding.weight - want["codebook.embedding.weight"]
    assert moved.abs().max() > 0.2 and len(kernels) == 30

NETS = {"VQGAN": (lambda: vqldm.VQGAN((6, 10), 4, 8, 2), lambda net: net(randn(2, 3, 16, 16))),
        "PatchDiscriminator": (lambda: vqldm.PatchDiscriminator((6, 10)),
                               lambda net: (net(randn(2, 3, 16, 16)),)),
        "UNet": (lambda: vqldm.UNet(4, (6, 10), 2, 3), lambda net: (
            net(randn(3, 4, 8, 8), torch.tensor([1, 50, 99]), torch.arange(3)),))}

@pytest.mark.parametrize("name", NETS)
def test_every_parameter_gets_a_gradient(name):
    """Not at the first step, where zeroed layers let nothing through, but soon: a layer that is
    built and never called would show."""
    torch.manual_seed(0)
    make, call = NETS[name]
    net = make()
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):
        opt.zero_grad()
        sum((y - 0.3).square().mean() for y in call(net) if y.is_floating_point()).backward()
        opt.step()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

def test_unet_listens_to_time_and_class():
    torch.manual_seed(0)
    net, z = vqldm.UNet(4, (8, 12), 1, 3), randn(3, 4, 8, 8)
    t, c = torch.tensor([5, 50, 99]), torch.arange(3)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):         # zeroed layers let it through one by one
        opt.zero_grad()
        (net(z, t, c) - randn(3, 4, 8, 8, key=1)).square().mean().backward()
        opt.step()
    for other in (net(z, t + 1, c), net(z, t, (c + 1) % 3), net(z, t)):
        assert (net(z, t, c) - other).flatten(1).abs().amax(1).min() > 1e-5
    assert torch.equal(net(z, t), net(z, t, torch.full((3,), 3)))       # class n_classes: not told

def test_attention_does_not_ask_for_its_weights(monkeypatch):
    """Those are B·heads·N² numbers. What it computes is attention: permuted in, permuted out."""
    asked, forward = [], nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, *a, **kw: (
        asked.append(kw.get("need_weights", True)), forward(self, *a, **kw))[1])
    block, x, order = vqldm.AttentionBlock(8, 2), randn(2, 8, 4, 4), randn(16).argsort()
    nn.init.normal_(block.attention.out_proj.weight)
    y, shuffled = block(x).flatten(2), block(x.flatten(2)[..., order].view_as(x)).flatten(2)
    assert asked == [False, False] and torch.allclose(y[..., order], shuffled, atol=1e-5)

def test_upsampling_paints_every_pixel_equally_often():
    """From a constant image, with equal weights, comes a constant: no checkerboard of period 2."""
    up = vqldm.UpBlock(3, 3).up
    nn.init.ones_(up.weight), nn.init.zeros_(up.bias)
    y = up(torch.ones(1, 3, 8, 8))
    assert y.shape[-1] == 16 and y[..., 2:-2, 2:-2].std() < 1e-6 < y.mean()

# ---- the losses of stage 1 ---------------------------------------------------------------------

def test_hinge_loss_by_hand():
    """Half of mean relu(1 - real) = (0 + 1 + 3)/3, and of mean relu(1 + fake) = (0 + 1 + 2)/3."""
    real, fake = (torch.tensor(v, requires_grad=True) for v in ([2.0, 0.0, -2.0], [-2.0, 0.0, 1.0]))
    loss = vqldm.hinge_loss(real, fake)
    assert float(loss.detach()) == pytest.approx((4 / 3 + 3 / 3) / 2)
    for got, want in zip(grads(loss, (real, fake)), ([0, -1, -1], [0, 1, 1])):
        assert torch.allclose(got, torch.tensor(want) / 6)      # no push beyond the margins

def test_discriminator_gives_raw_logits():
    """No sigmoid or tanh: 1000 times the last layer is 1000 times the answer, patch by patch."""
    disc, x = vqldm.PatchDiscriminator((8, 16)), randn(2, 3, 32, 32)
    before = disc(x).detach()
    for p in [m for m in disc.modules() if isinstance(m, nn.Conv2d)][-1].parameters():
        p.data *= 1000
    assert before.shape == (2, 1, 8, 8) and disc(x).abs().max() > 1
    assert torch.allclose(disc(x), 1000 * before, rtol=1e-4, atol=1e-3)

@pytest.fixture()
def game():
    """A VQGAN, a critic and one batch: (last layer, x_hat, fresh l_rec, fresh l_gan)."""
    torch.manual_seed(0)
    net, disc = vqldm.VQGAN((8, 8), 4, 16, 1), vqldm.PatchDiscriminator((8, 8))
    x = randn(4, 3, 16, 16)
    x_hat = net(x)[0]
    return net.decoder.last.weight, x_hat, lambda: F.mse_loss(x_hat, x), lambda: -disc(x_hat).mean()

@pytest.mark.parametrize("strength", [1e4, 1e-4])
def test_lam_makes_both_losses_push_the_last_layer_equally_hard(game, strength):
    """As the paper's authors compute it, by two full backward passes to that layer; where the
    critic's push is small beside δ = 1e-4, lam stays finite."""
    last, x_hat, rec, gan = game
    (g_rec, at_rec), (g_gan, at_gan) = (grads(f(), (last, x_hat)) for f in (rec, gan))
    lam, d_rec, d_gan = vqldm.adaptive_weight(rec(), strength * gan(), x_hat, last)
    push = strength * g_gan.norm()
    assert float(lam) == pytest.approx(float(g_rec.norm() / (push + 1e-4)), rel=1e-4)
    assert strength < 1 or float(lam * push) == pytest.approx(float(g_rec.norm()), rel=1e-3)
    assert torch.allclose(d_rec, at_rec) and torch.allclose(d_gan / strength, at_gan)

def test_lam_is_a_number_and_capped(game):
    """Detached, float32, and 1e4 at most: an untrained critic has almost no gradient."""
    last, x_hat, rec, gan = game
    lam, *_ = vqldm.adaptive_weight(1e9 * rec(), 0 * gan(), x_hat, last)
    assert lam == 1e4 and lam.shape == () and lam.dtype == torch.float32 and not lam.requires_grad
    assert not vqldm.adaptive_weight(rec(), gan(), x_hat, last)[0].requires_grad

@pytest.fixture()
def random_lpips(monkeypatch):
    """LPIPS with a random trunk, on small maps: enough to see how it is used."""
    import lpips
    features = vqldm.Perceptual.features
    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True,
                                                          eval_mode=False))
    monkeypatch.setattr(vqldm.Perceptual, "features", lambda self, u8, _=0, every=False: (
        features(self, u8, 64, every)))
    torch.manual_seed(0)

def test_lpips_is_in_no_network_and_stays_frozen_in_eval_mode(random_lpips):
    """And in float32 under autocast."""
    perceptual, owner = vqldm.Perceptual("squeeze", CPU), vqldm.VQGAN((8,), 4, 8, 1)
    owner.perceptual = perceptual
    owner.train()                       # would switch on the dropout of what is inside
    assert not any("perceptual" in k for k in owner.state_dict())
    modules = list(perceptual.net.modules())
    assert not any(m.training for m in modules) and any(isinstance(m, nn.Dropout) for m in modules)
    assert not any(p.requires_grad for p in perceptual.net.parameters())
    x, x_hat = randn(1, 3, 64, 64).clamp(-1, 1), randn(1, 3, 64, 64, key=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = perceptual(x, x_hat)
    assert inside.dtype == torch.float32 and torch.equal(inside, perceptual(x, x_hat))
    assert perceptual(x, x) == 0 and grads(inside, (x_hat,))[0].any()

@pytest.mark.parametrize("size", (8, 16, 31))
def test_lpips_compares_images_smaller_than_its_strides(random_lpips, size):
    """--size starts at 8; SqueezeNet's trunk has nothing left of anything below 17 pixels."""
    perceptual, x = vqldm.Perceptual("squeeze", CPU), randn(2, 3, size, size).clamp(-1, 1)
    assert perceptual(x, x) == 0 < perceptual(x, -x)

def test_missing_lpips_is_said_loudly_and_damaged_lpips_is_refused(monkeypatch, capsys):
    import lpips

    def missing(**_):
        raise OSError("no network")
    monkeypatch.setattr(lpips, "LPIPS", missing)
    assert vqldm.load_perceptual("auto", CPU) == vqldm.load_perceptual("off", CPU) == (None, "off")
    assert "WITHOUT" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="--lpips squeeze"):
        vqldm.load_perceptual("squeeze", CPU)
    blind = type("Blind", (nn.Module,), dict(forward=lambda self, x, y: x.new_zeros(1)))
    monkeypatch.setattr(lpips, "LPIPS", lambda **_: blind())        # sees no difference anywhere
    with pytest.raises(UserError, match="damaged"):
        vqldm.load_perceptual("auto", CPU)

# ---- the steps of stage 1, watched in a real run -----------------------------------------------
# A tiny train-vq runs once. At each update, before the weights change, its gradients are compared
# with those of the paper's formula, worked out anew in one plain backward.

SMALL = "--device cpu --precision fp32 --batch-size 8 --warmup 2".split()
SMALL_VQ = ["train-vq", *SMALL, *("--size 16 --n-images 48 --widths 8 16 --codes 16 "
                                  "--d-widths 8 16 --lpips off").split()]

def cli(*words):
    """The command, run in this process -> exit status."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return vqldm.main([str(w) for w in words])
    except SystemExit as e:
        code = e.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    gc.collect()                # a run that ended half way holds its lock until it is collected
    return code

def no_pictures(patch):
    for name in ("draw_rows", "draw_curves", "draw_usage", "draw_trajectory"):
        patch.setattr(vqldm, name, lambda *a, **kw: None)

def perceived(x, x_hat):        # stands for LPIPS: some distance with a gradient
    return F.avg_pool2d(x - x_hat, 4).abs().mean()

@pytest.fixture(scope="module")
def watched_vq(tmp_path_factory):
    """-> a fact for each generator step and each critic step, and what was seen at the start."""
    seen, facts = types.SimpleNamespace(calls=[], disc=None), []
    forward, critic = vqldm.VQGAN.forward, vqldm.PatchDiscriminator.forward
    update, revive = vqldm.Run.update, Codebook.revive

    def watch_forward(self, x):
        seen.net, seen.x, seen.out = self, x, forward(self, x)
        return seen.out

    def watch_critic(self, x):
        seen.disc = self
        seen.calls.append((x.requires_grad, any(p.requires_grad for p in self.parameters())))
        return critic(self, x)

    def watch_revive(self, z, dead, generator):
        revive(self, z, dead, generator)
        if not facts:
            far = torch.cdist(self.embedding.weight.detach(), flat(z)).amin(1).max()
            seen.start = bool(dead.all()), float(far / z.std())

    def equation_5(run):
        x_hat, _, _, codebook_loss, commit_loss = forward(seen.net, seen.x)
        l_rec = F.mse_loss(x_hat, seen.x) + 1.3 * perceived(seen.x, x_hat)
        loss = l_rec + 0.7 * codebook_loss + 0.3 * commit_loss
        nth = run.step + 1 - round(run.cfg.gan_start * run.n / 8)       # step of the GAN: 1, 2, …
        if nth > 0:
            l_gan, last = -critic(seen.disc, x_hat).mean(), (seen.net.decoder.last.weight,)
            lam = grads(l_rec, last)[0].norm() / (grads(l_gan, last)[0].norm() + 1e-4)
            ramp = min(1, nth / round(run.cfg.gan_ramp * run.n / 8))
            loss = loss + 0.8 * ramp * lam.detach() * l_gan
        return loss, nth > 0

    def equation_7():
        real, fake = critic(seen.disc, seen.x), critic(seen.disc, seen.out[0].detach())
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2, None

    def watch_update(self, optimizer, params, losses):
        mine, calls, seen.calls = params[0] is next(seen.net.parameters()), seen.calls, []
        loss, gan = equation_5(self) if mine else equation_7()
        error = max((p.grad - want).norm() / (want.norm() + 1e-6)
                    for p, want in zip(params, grads(loss, params)))
        other = seen.disc if mine else seen.net     # its gradients must be as its update left them
        leak = other is not None and not all(
            torch.equal(p.grad, g) for p, g in zip(other.parameters(), seen.kept, strict=True))
        done = update(self, optimizer, params, losses)
        seen.kept = [p.grad.clone() for p in params]
        facts.append(dict(step=self.step, mine=mine, gan=gan, calls=calls, leak=leak,
                          error=float(error), lr=optimizer.param_groups[0]["lr"],
                          norm=float(torch.cat([g.flatten() for g in seen.kept]).norm())))
        return done

    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.chdir(folder)
        patch.setattr(vqldm, "load_perceptual", lambda *a: (perceived, "squeeze"))
        patch.setattr(vqldm.VQGAN, "forward", watch_forward)
        patch.setattr(vqldm.PatchDiscriminator, "forward", watch_critic)
        patch.setattr(vqldm.Run, "update", watch_update)
        patch.setattr(Codebook, "revive", watch_revive)
        assert cli(*SMALL_VQ, *("--epochs 3 --gan-start 1 --d-warmup .4 --gan-ramp .5 --decay 0 "
                                "--lr .002 --d-lr .003 --codebook-weight .7 --commit-weight .3 "
                                "--gan-weight .8 --perceptual-weight 1.3").split()) == 0
    return types.SimpleNamespace(facts=facts, start=seen.start, folder=folder)

def test_generator_follows_equation_5_with_each_weight_in_its_place(watched_vq):
    """The backward in two parts, from x_hat and from the codes, has the gradients of rec + w·perc +
    a·codebook + b·commit + ramp·c·lam·L_GAN; the critic is asked only once the GAN is on."""
    steps = [f for f in watched_vq.facts if f["mine"]]
    assert [f["gan"] for f in steps] == [False] * 6 + [True] * 11
    assert [bool(f["calls"]) for f in steps] == [f["gan"] for f in steps]
    assert max(f["error"] for f in steps) < 1e-3

def test_critic_trains_alone_first_and_on_a_detached_fake(watched_vq):
    """Its gradient is that of hinge on the images as they were made, and reaches no generator."""
    steps = [f for f in watched_vq.facts if not f["mine"]]
    assert [f["step"] for f in steps] == list(range(4, 17))         # the GAN starts at 6
    assert max(f["error"] for f in steps) < 1e-3 and not any(f["leak"] for f in steps)
    assert all(f["calls"] == [(False, True)] for f in steps)        # (input, D) require gradients

def test_generator_step_leaves_no_gradient_in_the_critic(watched_vq):
    steps = [f for f in watched_vq.facts if f["mine"] and f["gan"]]
    assert all(f["calls"] == [(True, True)] and not f["leak"] for f in steps)

def test_training_starts_its_codes_from_encoder_outputs(watched_vq):
    all_of_them, distance = watched_vq.start
    assert all_of_them and distance < 0.2

@pytest.mark.parametrize("real, fake, lam, told", [
    (0.4, -0.3, 1.0, ""), (1.4, -0.5, 1.0, ""), (0.5, -1.2, 1.0, ""),
    (0.2, 0.2, 1.0, "blind"), (1.4, -1.2, 1.0, "won"), (0.4, 0, 1e4, "cap")])
def test_a_game_that_goes_wrong_is_told_in_plain_words(real, fake, lam, told):
    """Judged by the last hundred steps, and not before there are so many."""
    good, row = dict(d_real=0.5, d_fake=-0.5), dict(d_real=real, d_fake=fake, lam=lam)
    trouble = vqldm.gan_trouble([good] * 20 + [row, dict(held_psnr=9)] * 10)
    assert told in trouble and bool(trouble) == bool(told)
    assert not vqldm.gan_trouble([dict(rec=1)] * 50 + [row] * 9)

def test_learning_rate_is_absolute_and_gradients_are_clipped(watched_vq):
    """What was typed, after the warm-up: neither times the batch nor over it."""
    for f in watched_vq.facts:
        want = (0.002 if f["mine"] else 0.003) * min(1, (f["step"] + 1) / 3)
        assert f["lr"] == pytest.approx(want) and f["norm"] < 1.001

# ---- diffusion ---------------------------------------------------------------------------------

def cosine(t, T):
    return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

BETA = dict(        # linear: DDPM's 1e-4 … 0.02 at T = 1000
    linear=lambda T: [min((1e-4 + 0.0199 * t / (T - 1)) * 1000 / T, 0.999) for t in range(T)],
    cosine=lambda T: [min(1 - cosine(t + 1, T) / cosine(t, T), 0.999) for t in range(T)])

@pytest.mark.parametrize("T", [10, 50, 250, 1000])
@pytest.mark.parametrize("schedule", BETA)
def test_alpha_bar_is_the_product_and_ends_near_0_for_every_T(schedule, T):
    """Worked out in float64, so that one rounding is the only error. β belongs to its T: with the
    constants made for 1000, T = 50 would end at 0.60."""
    d, beta = Diffusion(T, schedule), np.array(BETA[schedule](T))
    product = [math.prod(1 - beta[:t + 1]) for t in range(T)]
    for got, want in ((d.beta, beta), (d.alpha, 1 - beta), (d.alpha_bar, product)):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.double(), want, rtol=1.2e-7)
    assert d.alpha_bar[-1] < 0.01 and (d.alpha_bar.diff() < 0).all()

@pytest.mark.parametrize("wrong", [(1, "linear"), (1000, "quadratic")])
def test_a_schedule_that_cannot_work_is_refused(wrong):
    with pytest.raises(ValueError):
        Diffusion(*wrong)

@pytest.mark.parametrize("target", ["v", "eps"])
def test_noise_is_added_in_closed_form_and_predict_takes_it_away(target):
    """z_t = √ᾱ z0 + √(1-ᾱ) eps, with ᾱ = 1 before all noise; from it and the right answer of a
    network comes (z0, eps), and a z0 beyond ±5 is not clipped."""
    d, t = Diffusion(1000, "linear", target), torch.tensor([0, 7, 300, 700])
    z0, eps = 5 * randn(4, 4, 3, 3), randn(4, 4, 3, 3, key=1)
    a = torch.tensor([math.prod(1 - b for b in BETA["linear"](1000)[:i + 1]) for i in t])
    a = a.view(4, 1, 1, 1)
    z_t = d.add_noise(z0, t, eps)
    assert torch.allclose(z_t, a.sqrt() * z0 + (1 - a).sqrt() * eps, atol=1e-4)
    assert torch.equal(d.add_noise(z0, torch.full((4,), -1), eps), z0)
    right = eps if target == "eps" else a.sqrt() * eps - (1 - a).sqrt() * z0
    for got, want in zip(d.predict(right, z_t, t), (z0, eps)):
        assert torch.allclose(got, want, atol=1e-3) and z0.abs().max() > 5

@pytest.mark.parametrize("target", ["v", "eps"])
def test_loss_is_0_for_the_right_answer_and_1_for_none(target):
    """On standardised latents, at every noise level: 1.0 on the screen means 'predicts nothing'."""
    d, t = Diffusion(1000, "linear", target), torch.arange(1000)
    z0, eps = randn(1000, 4, 4, 4), randn(1000, 4, 4, 4, key=1)
    a = d.alpha_bar.view(-1, 1, 1, 1)

    def knows(z_t, t, label):
        assert torch.allclose(z_t, a.sqrt() * z0 + (1 - a).sqrt() * eps, atol=1e-5)
        return eps if target == "eps" else a.sqrt() * eps - (1 - a).sqrt() * z0
    assert d.loss(knows, z0, t, eps).max() < 1e-10
    nothing = d.loss(lambda z_t, t, label: torch.zeros_like(z_t), z0, t, eps)
    assert nothing.shape == (1000,) and abs(nothing.mean() - 1) < 5 * math.sqrt(2 / z0.numel())

def test_weight_makes_of_vs_loss_twice_the_geometric_mean_of_both_errors():
    """Unweighted it is their sum. Whatever the network answers, and however wrong. But no level
    counts less than a quarter, not even pure noise."""
    d, t = Diffusion(1000, "linear", "v"), torch.arange(0, 1000, 9)
    z0, eps, out = (randn(len(t), 2, 3, 3, key=i) for i in range(3))
    guesses = d.predict(out, d.add_noise(z0, t, eps), t)
    of_z0, of_eps = ((guess - true).square().flatten(1).mean(1)
                     for guess, true in zip(guesses, (z0, eps)))
    loss = d.loss(lambda z_t, t, label: out, z0, t, eps)
    assert torch.allclose(loss, of_z0 + of_eps, rtol=1e-3)
    means, inner = 2 * (of_z0 * of_eps).sqrt(), d.weight(t) > 0.25
    assert inner.sum() > 50 and not inner[0] and not inner[-1]
    assert torch.allclose((d.weight(t) * loss)[inner], means[inner], rtol=1e-2)
    assert torch.equal(d.weight(t)[~inner] * loss[~inner], loss[~inner] / 4)
    assert d.weight(t).max() == pytest.approx(1, abs=1e-3)

def test_pairs_are_exactly_S_steps_for_every_S():
    """From T-1, or the level that one starts from, strictly down to -1, in growing strides."""
    d = Diffusion(1000)
    for levels, S in [(1000, S) for S in range(1, 1001)] + [(600, S) for S in (1, 7, 599, 600)]:
        t, prev = zip(*d.pairs(S, levels))
        assert len(t) == S and t[0] == levels - 1 and prev == (*t[1:], -1)
        strides = [a - b for a, b in zip(t, prev)]
        assert min(strides) > 0 and all(b - a > -2 for a, b in zip(strides, strides[1:-1]))
    assert d.pairs(50) == d.pairs(50, 1000)
    assert [t for t, _ in d.pairs(4)] == [999, 937, 749, 437]     # 999 - 1000 (i/4)²

def test_diffusion_refuses_words_that_it_does_not_know():
    """A misspelt one must not be taken for another."""
    for words in (dict(schedule="cosin"), dict(target="x")):
        with pytest.raises(ValueError, match="must be"):
            Diffusion(**words)
    with pytest.raises(ValueError, match="'ddmp': must be dpm, ddim or ddpm"):
        next(Diffusion().sample(lambda z, t: z, randn(1, 1, 2, 2), 2, "ddmp"))

def test_diffusion_has_no_defaults_of_its_own():
    d, cfg = Diffusion(), vqldm.LDMConfig()
    assert (d.T, d.target) == (cfg.T, cfg.target)
    assert torch.equal(d.alpha_bar, Diffusion(cfg.T, cfg.schedule).alpha_bar)
    for name in ("eta", "sampler"):
        assert inspect.signature(d.sample).parameters[name].default == getattr(
            vqldm.Sampling(), name)

SAMPLERS = [("ddpm", 1.0), ("ddim", 1.0), ("ddim", 0.0), ("dpm", 0.0)]

@pytest.mark.parametrize("sampler, eta", SAMPLERS)
@pytest.mark.parametrize("S", [1, 2, 7, 50])
def test_last_step_is_free_of_noise_and_returns_the_clean_guess(S, sampler, eta):
    """If the data is one point, at 5, every sampler arrives there in any number of steps. Noise is
    drawn S-1 times: not after the last step, nor at all on a fixed path."""
    d, point, drawn = Diffusion(1000, "linear", "eps"), torch.full((3, 2, 2, 2), 5.0), []

    def net(z_t, t):
        a = d.alpha_bar[t].view(-1, 1, 1, 1)
        return (z_t - a.sqrt() * point) / (1 - a).sqrt()

    def noise():
        drawn.append(1)
        return randn(3, 2, 2, 2, key=len(drawn))
    *_, (z, z0_hat) = d.sample(net, randn(3, 2, 2, 2), S, sampler, eta, noise)
    assert len(drawn) == (S - 1 if eta else 0)
    assert torch.allclose(z, z0_hat, atol=1e-5) and torch.allclose(z, point, atol=0.02)

# The data of the oracle: three round clouds in the plane, with all moments known.
WEIGHT, SPREAD = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.3, 0.35])
CENTRE = torch.tensor([[-1.0, 0.4], [1.0, 0.7], [0.6, -1.6]])
MEAN = WEIGHT @ CENTRE
COV = (CENTRE.T * WEIGHT) @ CENTRE - MEAN[:, None] * MEAN + (WEIGHT @ SPREAD ** 2) * torch.eye(2)

def bayes(x, a):
    """For x (n,2) = √a z0 + √(1-a) eps: log p(x and cloud) (n,3), and E[eps | x] (n,2)."""
    var, away = a * SPREAD ** 2 + 1 - a, x[:, None] - a.sqrt() * CENTRE
    log_p = WEIGHT.log() - var.log() - away.square().sum(2) / var / 2
    each = (1 - a).sqrt() * away / var[:, None]
    return log_p, (log_p.softmax(1)[:, :, None] * each).sum(1)

@pytest.mark.parametrize("schedule, S", [
    *(("linear", S) for S in (7, 50, 250, 1000)), *(("cosine", S) for S in (7, 50, 250))])
@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_oracle_every_sampler_draws_the_data_from_the_perfect_network(sampler, eta, schedule, S):
    """With E[eps | z_t] for a network the samples have the data's mean, covariance and share of
    each cloud, for both targets. Two errors remain. Chance: 4.5 standard errors of n samples (the
    coordinates have a std below 1, their products below 1.5, a share below 1/2). And finite steps:
    most samplers are of first order, so it falls as 1/S; 4/S bounds it for this data."""
    n, made = 4000, {}
    for target in ("v", "eps"):
        d = Diffusion(1000, schedule, target)
        fresh = (randn(n, 2, 1, 1, key=i) for i in range(S + 1))

        def net(z, t, d=d):
            a = d.alpha_bar[t[0]]
            eps = bayes(z.flatten(1), a)[1].view_as(z)
            return eps if d.target == "eps" else (eps - (1 - a).sqrt() * z) / a.sqrt()
        *_, (z, _) = d.sample(net, next(fresh), S, sampler, eta, lambda fresh=fresh: next(fresh))
        made[target] = z.flatten(1)
    x, chance = made["v"], 4.5 / math.sqrt(n)
    assert (x - made["eps"]).abs().max() < 0.02         # one formula in two costumes
    share = torch.bincount(bayes(x, torch.tensor(1.0))[0].argmax(1), minlength=3) / n
    assert (x.mean(0) - MEAN).abs().max() < chance + 1 / S
    assert (x.T.cov() - COV).abs().max() < 1.5 * chance + 4 / S
    assert (share - WEIGHT).abs().max() < chance / 2 + 1 / S

def test_oracle_dpm_is_of_second_order():
    """Both fixed paths lead to the same samples, DDIM with an error of 1/S, DPM with about 1/S²:
    halving the strides halves the one and takes the other to a third or less, and 25 steps of DPM
    keep the data's covariance better than 50 of DDIM."""
    d, z = Diffusion(1000, "cosine", "v"), randn(1000, 2, 1, 1)

    def net(z_t, t):
        a = d.alpha_bar[t[0]]
        return (bayes(z_t.flatten(1), a)[1].view_as(z_t) - (1 - a).sqrt() * z_t) / a.sqrt()

    def walk(sampler, S):
        *_, (x, _) = d.sample(net, z, S, sampler, 0.0)
        return x.flatten(1)
    exact = walk("ddim", 1000)
    assert (exact - walk("dpm", 1000)).norm(dim=1).mean() < 0.002
    far = {(s, S): (walk(s, S).T.cov() - exact.T.cov()).abs().max() for s in ("ddim", "dpm")
           for S in (12, 25, 50)}
    assert 1.7 < far["ddim", 25] / far["ddim", 50] < 2.5 < 3 < far["dpm", 12] / far["dpm", 25]
    assert far["dpm", 25] < far["ddim", 50] / 4

def test_guidance_extrapolates_from_the_guide_without_class_to_the_class():
    """w = 1 is exactly the conditional network, w = 0 exactly the one that is not told; else w
    times the way from what the guide says without the class. Without classes there is a guide too.
    """
    torch.manual_seed(0)
    net, guide, z = vqldm.UNet(4, (8,), 1, 3), vqldm.UNet(4, (8,), 1, 3), randn(3, 4, 4, 4)
    t, c = torch.tensor([1, 5, 9]), torch.arange(3)
    for p in [*net.parameters(), *guide.parameters()]:
        nn.init.normal_(p, std=0.3)
    plain, told, weak = net(z, t), net(z, t, c), guide(z, t)
    assert (plain - told).abs().max() > 0.01 < (plain - weak).abs().max()
    assert torch.equal(vqldm.guided(net, guide, c, 1)(z, t), told)
    assert torch.equal(vqldm.guided(net, guide, c, 0)(z, t), plain)
    for label, end in (c, told), (None, plain):
        for w in (2, 0.5, 7):
            want = weak + w * (end - weak)
            assert torch.allclose(vqldm.guided(net, guide, label, w)(z, t), want, atol=1e-4)

def test_guidance_leaves_the_noisiest_levels_alone():
    """From guide_below · T upwards the network answers alone, below the guide is asked too, and not
    told the class."""
    asked, label, d = {}, torch.tensor([0, 1]), Diffusion(100)

    def net(z, t, label):
        asked[int(t[0])] = label.tolist()
        return z * 0 + label.view(-1, 1, 1, 1)

    def guide(z, t, label=None):
        asked[int(t[0])].append(label)
        return z * 0
    list(d.sample(vqldm.guided(net, guide, label, 3, 0.8 * d.T), randn(2, 1, 2, 2), 50))
    assert len(asked) == 50 and {t for t, names in asked.items() if names == [0, 1, None]} == \
        {t for t in asked if t < 80} != set(asked)
    assert asked[99] == [0, 1]

def test_guidance_mends_what_a_young_network_does_not_know_yet():
    """Why it helps, in closed form: numbers of spread 1, networks that know the best answer to z_t
    but for a part, an older one for a small and a younger one for a large part. Alone the
    older one makes too narrow a spread; at w = 2, with the younger as its guide, the right one."""
    d, spread = Diffusion(100, target="v"), {}

    def young(missing):
        def net(z, t, label=None):      # the best v for z0 ~ N(0, 1) is 0
            return (d.at(t, z) * (1 - d.at(t, z))).sqrt() * z * missing
        return net
    for name, net in (("alone", young(.2)), (
            "guided", vqldm.guided(young(.2), young(.4), None, 2))):
        *_, (z0, _) = d.sample(net, randn(4000, 1, 1, 1), 50)
        spread[name] = float(z0.std())
    assert spread["alone"] < 0.93 and abs(spread["guided"] - 1) < 0.03

def test_generator_guides_below_a_part_of_its_own_T(watched_ldm, monkeypatch):
    seen, guided = [], vqldm.guided
    monkeypatch.setattr(vqldm, "guided", lambda *a: seen.append(a[3:]) or guided(*a))
    label = torch.zeros(1, dtype=torch.long)
    watched_ldm.make(vqldm.Sampling(steps=2, guidance=3.0, guide_below=0.4), [0], label)
    assert seen == [(3.0, 0.4 * watched_ldm.make.cfg.T)]

# ---- the steps of stage 2, watched in a real run -----------------------------------------------

@pytest.fixture(scope="module")
def watched_ldm(watched_vq):
    """Twelve whole epochs with T = 10 -> what all steps were given, and a Generator of the end."""
    steps, weights, loss, average = [], [], Diffusion.loss, vqldm.update_ema

    def watch_loss(self, net, z0, t, eps, label=None):
        if torch.is_grad_enabled():         # training, not measuring
            steps.append(dict(z0=z0, t=t, eps=eps, label=label))
            weights.extend([net.first.weight.detach().clone()] * (not weights))
        each = loss(self, net, z0, t, eps, label)
        if each.requires_grad:              # with what weight does the step descend each of them?
            each.register_hook(lambda pull: steps[-1].update(pull=pull * len(pull)))
        return each

    def watch_average(ema, net, step, decay):
        weights.append(net.first.weight.detach().clone())
        average(ema, net, step, decay)
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.chdir(watched_vq.folder)
        patch.setattr(Diffusion, "loss", watch_loss)
        patch.setattr(vqldm, "update_ema", watch_average)
        patch.setattr(vqldm, "GUIDE_STEPS", 0)
        assert cli("train-ldm", *SMALL, *"--T 10 --unet-widths 8 --epochs 12 --ema .8 "
                   "--label-drop .3 --lr .01".split()) == 0
        state = vqldm.load_checkpoint("runs/ldm", ["ldm"], "--ckpt")
    make = vqldm.Generator(state, CPU, None, "")
    return types.SimpleNamespace(**{k: torch.cat([s[k] for s in steps]) for k in steps[0]},
                                 weights=weights, state=state, make=make)

def test_a_guide_knows_something(here):
    """In a run shorter than GUIDE_STEPS the guide is the mean itself: classifier-free guidance. An
    earlier guide, which answers 0 to all, would only magnify by w what the network says."""
    state = vqldm.load_checkpoint("runs/ldm", ["ldm"], "--ckpt")
    assert state["step"] < vqldm.GUIDE_STEPS
    assert all(torch.equal(w, state["ema"][name]) for name, w in state["guide"].items())

def test_training_draws_every_t_alike_and_hides_labels(watched_ldm):
    """t covers 0…T-1, so that no step is sampled that was never trained. 44 · 12 = 528 draws."""
    t, hidden = torch.bincount(watched_ldm.t), (watched_ldm.label == 4).float().mean()
    assert len(t) == 10 and (t - 52.8).abs().max() < 4.5 * math.sqrt(528 * 0.1 * 0.9)
    assert abs(hidden - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 528) and watched_ldm.label.max() == 4
    assert abs(watched_ldm.eps.std() - 1) < 0.02 and abs(watched_ldm.eps.mean()) < 0.02

def test_training_descends_the_weighted_loss(watched_ldm):
    weight = Diffusion(10, "cosine").weight(watched_ldm.t)
    assert torch.allclose(watched_ldm.pull, weight, atol=1e-6)

def test_all_t_alike_is_one_word_away(watched_vq, monkeypatch):
    def never(self, t):
        raise AssertionError("weighted")
    no_pictures(monkeypatch)
    monkeypatch.chdir(watched_vq.folder)
    monkeypatch.setattr(Diffusion, "weight", never)
    words = [*SMALL, *"--T 10 --unet-widths 8 --epochs 1 --out runs/alike".split()]
    assert cli("train-ldm", *words, "--weighting", "alike") == 0
    with pytest.raises(AssertionError, match="weighted"):
        cli("train-ldm", *words, "--overwrite")

def test_latents_are_standardised_over_the_whole_training_set(watched_ldm):
    z0 = watched_ldm.z0.double().transpose(0, 1).flatten(1)             # each image twelve times
    assert z0.mean(1).abs().max() < 1e-4 and (z0.std(1, correction=0) - 1).abs().max() < 1e-3

def test_standardise_and_unstandardise_are_inverse():
    z, scale = randn(2, 4, 3, 3), torch.stack([randn(4), randn(4, key=1).abs() + 0.1])
    z0 = vqldm.standardise(z, scale)
    assert torch.allclose(vqldm.unstandardise(z0, scale), z, atol=1e-5)
    assert torch.allclose(z0[:, 2], (z[:, 2] - scale[0, 2]) / scale[1, 2])

def test_decode_of_encode_is_the_vqgans_own_reconstruction(watched_ldm):
    """Through settling, standardising and back the codes are the same: one scale on both sides."""
    make, x = watched_ldm.make, vqldm.to_float(vqldm.synthetic(16, 16, seed=9)[0])
    own = vqldm.to_bytes(make.vqgan(x)[0])
    assert (make.decode(make.encode(x)).int() - own.int()).abs().max() <= 1
    assert own.float().std() > 5

def test_ema_and_guide_are_the_closed_form_with_warm_up_and_what_samples(watched_ldm):
    """Step i keeps d_i = min(d, (1+i)/(10+i)) of it. With d = 0.9999, a thousand steps leave of the
    first weights ∏ d_i < 1e-6, not 0.9."""
    want, *rest = watched_ldm.weights
    for i, w in enumerate(rest):
        d = min(0.8, (1 + i) / (10 + i))
        want = d * want + (1 - d) * w
        if i == 13:         # the guide is the mean after a fifth of the 66 steps
            young = want
    ema, weights = watched_ldm.state["ema"]["first.weight"], watched_ldm.make.net.first.weight
    assert len(rest) == 66 and torch.allclose(ema, want, atol=1e-5)
    assert torch.equal(weights, ema) and not torch.equal(weights, rest[-1])
    guide, makes = watched_ldm.state["guide"], watched_ldm.make.guide.first.weight
    assert torch.equal(makes, guide["first.weight"]) and torch.allclose(makes, young, atol=1e-5)
    assert not torch.allclose(makes, ema, atol=1e-3)
    one, none = (nn.Linear(1, 1, bias=False).requires_grad_(mine) for mine in (False, True))
    one.weight.data.fill_(1), none.weight.data.fill_(0)
    for i in range(1000):
        vqldm.update_ema(one, none, i, 0.9999)
    left = math.prod((1 + i) / (10 + i) for i in range(1000))
    assert left < 1e-6 and float(one.weight) == pytest.approx(left, rel=1e-3)
    assert not one.weight.requires_grad         # else it would hold the history of all steps

# ------------------------------------------------------------------------------------------------
# B. Data
# ------------------------------------------------------------------------------------------------

# ---- synthetic lesions, symmetries, epochs -----------------------------------------------------

def test_synthetic_image_i_depends_on_seed_and_i_only():
    x, label = vqldm.synthetic(12, 24, seed=3)
    assert x.shape == (12, 3, 24, 24) and x.dtype == torch.uint8
    assert label.tolist() == [0, 1, 2, 3] * 3 and len(vqldm.SYNTHETIC_CLASSES) == 4
    y, later = vqldm.synthetic(3, 24, seed=3, start=7)
    assert (y.int() - x[7:10].int()).abs().max() <= 1 and torch.equal(later, label[7:10])
    assert torch.equal(x, vqldm.synthetic(12, 24, seed=3)[0])
    both = torch.cat([x, vqldm.synthetic(12, 24, seed=4)[0]])
    assert len(both.unique(dim=0)) == 24 and (x.float().flatten(1).std(1) > 8).all()

def test_turn_gives_the_eight_symmetries_of_the_square():
    """Eight different pictures, each with the same pixels, each pixel as far from the middle."""
    picture, c = torch.arange(36).view(1, 1, 6, 6).expand(8, 3, 6, 6), torch.arange(6.0) - 2.5
    turned = vqldm.turn(picture, torch.arange(8))
    assert len(turned.unique(dim=0)) == 8 and torch.equal(turned[0], picture[0])
    assert torch.equal(turned.flatten(2).sort(2).values, picture.flatten(2))
    far = (c[:, None] ** 2 + c ** 2).expand(8, 1, 6, 6)
    assert torch.equal(vqldm.turn(far, torch.arange(8)), far)

def test_pixels_survive_the_way_to_floats_and_back():
    u8 = torch.arange(256).byte().view(1, 1, 16, 16)
    assert (vqldm.to_float(u8).min(), vqldm.to_float(u8).max()) == (-1, 1)
    assert torch.equal(vqldm.to_bytes(vqldm.to_float(u8)), u8)
    assert vqldm.to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]

@pytest.mark.parametrize("n, batch", [(10, 4), (7, 16), (44, 8)])
def test_every_epoch_visits_every_image_once_in_a_new_order(n, batch):
    def epochs(seed):
        run = types.SimpleNamespace(cfg=types.SimpleNamespace(batch_size=batch, seed=seed), n=n)
        steps = []
        for run.step in range(n):           # n steps of `batch` images are `batch` epochs
            steps.append(vqldm.Run.indices(run))
        return torch.stack(steps).view(batch, n)
    order = epochs(0)
    assert torch.equal(order.sort(1).values, torch.arange(n).expand(batch, n))
    assert len(order.unique(dim=0)) == batch
    assert torch.equal(order, epochs(0)) and not torch.equal(order, epochs(1))

# ---- a folder of images ------------------------------------------------------------------------

def picture(mode="RGB", left="red", right="blue", size=(40, 40)):
    im = Image.new(mode, size, left)
    im.paste(right, (size[0] // 2, 0, *size))
    return im

def fill(folder, names, **kw):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        picture(left=(i * 37 % 256, i * 11 % 256, 99), **kw).save(folder / name)
    return folder

def table(folder, rows):
    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader(), out.writerows(rows)

def png_head(wide, high):
    """A PNG that claims to be so large, and has no pixels."""
    def chunk(kind, data):
        data = kind + data
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", zlib.compress(b"")).join((
        chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)), chunk(b"IEND", b"")))

@pytest.fixture()
def load(tmp_path):
    """load(folder, **settings), as train-vq does."""
    def call(folder, **kw):
        cfg = vqldm.VQConfig(cache=str(tmp_path / "cache"), **kw)
        return vqldm.load_images(str(folder), 16, 99, 0.2, cfg)
    return call

def test_every_kind_of_image_comes_out_upright_and_in_its_colours(tmp_path):
    red, green, blue, black, grey, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), 0, 128, 255
    ramp = np.repeat(np.array([[0, 32896]], np.uint16), 20, 1).repeat(40, 0)
    hidden = picture("RGBA", (0, 255, 0, 0), (0, 0, 255, 255))      # green that nobody can see
    palette = picture("P", 1, 2)
    palette.putpalette([9, 9, 9, *green, *blue])
    lying, turned = picture().rotate(90, expand=True), Image.Exif()
    turned[0x0112] = 6                                              # "turn me right"
    kinds = {"plain.png": (picture(), {}, red, blue), "UPPER.JPG": (picture(), {}, red, blue),
             "grey.png": (picture("L", 0, 255), {}, black, white),
             "sixteen bits.png": (Image.fromarray(ramp), {}, black, grey),
             "hidden.png": (hidden, {}, white, blue), "palette.gif": (palette, {}, green, blue),
             "palette.png": (palette, dict(transparency=1), white, blue),
             "turned.jpg": (lying, dict(exif=turned), red, blue),
             "four inks.jpg": (picture().convert("CMYK"), {}, red, blue),
             "large.jpg": (picture(size=(2000, 1500)), {}, red, blue),
             "tiny.bmp": (picture(size=(4, 4)), {}, red, blue)}
    small = []
    for name, (im, how, *colours) in kinds.items():
        im.save(tmp_path / name, **how)
        x = vqldm.decode(tmp_path / name, 16, small).astype(float)
        for half, colour in zip((x[:, 3:13, 1:6], x[:, 3:13, 10:15]), colours):
            assert x.shape == (3, 16, 16) and abs(half.mean((1, 2)) - colour).max() <= 8, name
    assert [path.name for path in small] == ["tiny.bmp"]

def test_small_images_are_enlarged_with_a_warning(tmp_path, load, capsys):
    load(fill(tmp_path / "photos", ["a.png", "b.png"], size=(15, 40)))
    assert "WARNING 2 images are smaller than 16×16" in "".join(capsys.readouterr())
    load(fill(tmp_path / "large", ["a.png", "b.png"], size=(16, 40)))
    assert "WARNING" not in "".join(capsys.readouterr())

def test_only_photographs_are_listed(tmp_path):
    """Not hidden or half-loaded files, masks, or our own contact sheets; a loop of links is walked
    once; names may hold spaces and line breaks. Everything else is counted."""
    good = ["Test/a b/x.JPeG", "Train/a b/1.png", "line\nbreak.png", "z.tiff"]
    other = [".hidden.png", "q-partial.jpg", "I_1_segmentation.png", "grid.png", "notes.txt", "png"]
    for name in (*good, *other, ".git/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "Train/loop").symlink_to(tmp_path)
    assert vqldm.list_images(tmp_path) == (sorted(good), len(other))

def test_bad_images_are_named_counted_and_left_out(tmp_path, load, capsys):
    good = [f"{i:02d}.png" for i in range(24)]
    folder = fill(tmp_path / "photos", good)
    picture(size=(300, 300)).save(folder / "cut.jpg", quality=99)
    for name, content in {"cut.jpg": (folder / "cut.jpg").read_bytes()[:-900], "empty.png": b"",
                          "text.jpg": b"<html>not found</html>", "bomb.png": png_head(10**4, 10**4),
                          "huge\n.png": png_head(60_000, 60_000)}.items():
        (folder / name).write_bytes(content)
    for _ in range(2):                      # the second time from the cache
        images = load(folder)
        told, used = capsys.readouterr().out, torch.cat([images.train, images.held])
        for word in ("5 of 29", "cut.jpg", "empty", "text.jpg", "bomb", "huge"):
            assert word in told and told.count("exceeds limit") == 2        # not opened at all
        assert sorted(images.names[i] for i in used) == good
        assert images.rows(used).flatten(1).amax(1).min() > 0
    for name in good[:5]:
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"(?s)5 of 24.*--allow-bad"):       # more than a fifth
        load(folder)
    images = load(folder, allow_bad=True)
    assert len(images.train) + len(images.held) == 19

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_with_the_name_of_an_image_is_not_opened(tmp_path):
    """Opening it would wait for a writer for ever."""
    folder = fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    os.mkfifo(folder / "pipe.png")
    names, other = vqldm.list_images(folder)
    assert len(names) == 8 and other == 1

def test_a_folder_that_cannot_be_opened_is_told(tmp_path, load, monkeypatch):
    """Not passed over, with the images in it. (Root may open all: there the system is played.)"""
    fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    closed, scan = fill(tmp_path / "photos/closed", ["x.png"]), os.scandir

    def refuse(path="."):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="closed.*Permission denied"):
        load(tmp_path / "photos")

def test_a_file_of_another_kind_is_no_image_whatever_its_name(tmp_path, load):
    """PIL alone would open an EPS, and run Ghostscript, a programming language, on it."""
    folder = fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    picture().save(folder / "x.eps")
    (folder / "x.eps").rename(folder / "x.png")
    with pytest.raises(Image.UnidentifiedImageError):
        vqldm.decode(folder / "x.png", 16, [])
    assert len(load(folder).bad) == 1

def test_a_table_that_cannot_be_read_is_as_if_it_were_not_there(tmp_path):
    folder = fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    (folder / "metadata.csv").write_text("isic_id,dx\n0," + "x" * 200_000)     # over csv's limit
    assert vqldm.read_table(folder) == {}

def test_a_link_to_nowhere_is_one_bad_image_not_the_end(tmp_path, load):
    folder = fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = load(folder)
    assert len(images.train) + len(images.held) == 8

def mutate(content, others, dice):
    """-> (an image file damaged in one of six ways, can it still be read as if it were whole)."""
    flipped, at = bytearray(content), dice.randrange(len(content))
    for _ in range(dice.choice([1, 3, 30])):            # most of them near the start
        flipped[int(len(content) * dice.random() ** 2)] ^= 1 << dice.randrange(8)
    how = dice.randrange(8)
    return (b"", dice.randbytes(at), content[:at], dice.choice(others)[:40] + content[40:],
            content + dice.randbytes(at), flipped, flipped, flipped)[how], how == 4

@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_of_hundreds_of_damaged_images_none_stops_the_loader_or_spoils_a_good_one(tmp_path, load):
    """Flipped bits, cuts, foreign heads, noise, nothing at all, junk at the end, any suffix: each
    is decoded or counted as bad; every good image is used, with the same pixels as without them."""
    dice, good, twins, ends = random.Random(0), {}, {}, ("png", "jpg", "gif", "bmp", "tiff", "webp")
    for i, x in enumerate(vqldm.synthetic(20, 24, 0)[0].permute(0, 2, 3, 1).numpy()):
        name = fill(tmp_path / "calm", []) / f"good {i}.{ends[i % 6]}"
        Image.fromarray(x).save(name)
        good[name.name] = name.read_bytes()
    shutil.copytree(tmp_path / "calm", tmp_path / "all")
    for i in range(600):
        twin, name = dice.choice(list(good)), f"m {i}{dice.choice(vqldm.SUFFIXES)}"
        content, whole = mutate(good[twin], list(good.values()), dice)
        (tmp_path / "all" / name).write_bytes(content)
        twins.update({name: twin} if whole else {})
    calm, images = load(tmp_path / "calm"), load(tmp_path / "all", allow_bad=True)
    used = {images.names[i]: int(i) for i in torch.cat([images.train, images.held])}
    bad = {name for name in images.names if any(repr(name) in text for text in images.bad)}
    assert len(images.names) == 620 == len(used) + len(images.bad) and len(bad) == len(images.bad)
    assert not used.keys() & bad and used.keys() >= good.keys() | twins.keys()
    assert len(twins) > 50 and len(bad) > 200 and len(used) > 20 + len(twins) + 50
    assert torch.equal(images.rows([used[n] for n in calm.names]), calm.rows(range(20)))
    assert all(torch.equal(*images.rows([used[a], used[b]])) for a, b in twins.items())

def test_an_image_that_changes_or_goes_between_scan_and_decoding_harms_only_itself(
        tmp_path, load, monkeypatch):
    """Replaced, it is decoded again in the next run; cut or gone, it is a bad one."""
    folder = fill(tmp_path / "photos", [f"{i}.png" for i in range(24)])

    def late(path, size, small, decode=vqldm.decode):
        if path.name == "1.png":
            picture(left="white", size=(30, 30)).save(path)
        elif path.name in ("2.png", "3.png"):
            path.unlink() if path.name == "3.png" else path.write_bytes(path.read_bytes()[:60])
        return decode(path, size, small)
    with monkeypatch.context() as patch:
        patch.setattr(vqldm, "decode", late)
        first = load(folder)
    picture().save(folder / "3.png")
    again = load(folder)
    assert [len(images.bad) for images in (first, again)] == [2, 1] and first.names == again.names
    for name in set(first.names) - {"2.png", "3.png"}:
        want = torch.from_numpy(vqldm.decode(folder / name, 16, []).copy())
        a, b = (images.rows([images.names.index(name)])[0] for images in (first, again))
        assert torch.equal(b, want) and (name == "1.png" or torch.equal(a, want))

@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch(),
                                  lambda p: (p.mkdir(), (p / "a.txt").touch()),
                                  lambda p: (p.mkdir(), (p / "a.png").touch())])
def test_a_folder_without_images_is_a_users_mistake(tmp_path, load, make):
    make(tmp_path / "photos")
    with pytest.raises(UserError, match="--data .*photos"):
        load(tmp_path / "photos", allow_bad=True)

def test_images_are_decoded_once_and_again_when_they_change(tmp_path, load, monkeypatch):
    folder, both = fill(tmp_path / "photos", ["a.png", "b.png"]), torch.arange(2)
    first = load(folder).rows(both)
    with monkeypatch.context() as patch:
        patch.setattr(vqldm, "decode", lambda *a: pytest.fail("decoded twice"))
        assert torch.equal(load(folder).rows(both), first)
    fill(folder, ["b.png"], size=(30, 30), right="white")
    assert not torch.equal(load(folder).rows(both), first)

def test_folders_are_classes_and_train_and_test_the_split(tmp_path, load):
    """As Kaggle has them, with spaces in the path. Folders outweigh a table."""
    for part, n in (("Train", 3), ("Test", 2)):
        for c in ("basal cell carcinoma", "nevus"):
            fill(tmp_path / "Skin cancer" / part / c, [f"{c[0]}{part}{i}.png" for i in range(n)])
    table(tmp_path / "Skin cancer", [dict(image="nTrain0", dx="scar")])
    images = load(tmp_path / "Skin cancer")
    assert images.classes == ["basal cell carcinoma", "nevus"]
    assert len(images.train) == 6 and len(images.held) == 4
    for i, name in enumerate(images.names):
        assert images.classes[images.labels[i]] == Path(name).parts[1]
        assert (i in images.held) == name.startswith("Test")

def test_the_first_held_out_images_are_a_mixture_of_classes(tmp_path, load):
    """Files are sorted by folder: measured on the first few as they lie, a run sees one class."""
    for part, n in (("train", 1), ("test", 40)):
        for c in "ab":
            fill(tmp_path / "x" / part / c, [f"{i}.png" for i in range(n)], size=(8, 8))
    images = load(tmp_path / "x")
    first = torch.bincount(images.labels[images.held[:20]], minlength=2)
    assert first.min() > 3 and len(images.held.unique()) == 80
    assert torch.equal(images.held, load(tmp_path / "x").held)          # the same in each run

@pytest.mark.parametrize("key", ["isic_id", "image_id", "image"])   # the archive, HAM10000, 2019
def test_a_flat_folder_takes_its_classes_from_metadata_csv(tmp_path, load, key):
    folder = fill(tmp_path / "isic", ["ISIC_1.png", "ISIC_2.png", "ISIC_3.png"])
    table(folder, [{key: "ISIC_1", "diagnosis_1": "Benign", "diagnosis_3": "Nevus"},
                   {key: "ISIC_2", "diagnosis_1": "Malignant", "diagnosis_3": ""}])
    images = load(folder)
    assert [images.classes[k] for k in images.labels] == ["Nevus", "Malignant", "images"]

def test_photographs_of_one_lesion_stay_on_one_side(tmp_path):
    """And one whose lesion is unknown is trained on: it might show any of them."""
    names = [f"ISIC_{i:03d}.jpg" for i in range(300)]
    lesion = {n: f"IL_{i // 3}" if i < 240 else "" for i, n in enumerate(names)}
    table(tmp_path, [dict(isic_id=Path(n).stem, lesion_id=lesion[n]) for n in names])
    held = dict(zip(names, vqldm.arrange(tmp_path, names, 0.25)[1]))
    sides = {one: {held[n] for n in names if lesion[n] == one} for one in set(lesion.values())}
    assert all(len(side) == 1 for side in sides.values()) and sides[""] == {False}
    assert 0.1 < sum(held.values()) / 240 < 0.4

def test_the_split_of_old_images_does_not_change_when_new_ones_come(tmp_path):
    names = [f"{i:03d}.jpg" for i in range(400)]
    before, after = (dict(zip(n, vqldm.arrange(tmp_path, n, 0.2)[1])) for n in (names[::2], names))
    assert all(after[n] == before[n] for n in before)
    assert abs(sum(after.values()) / 400 - 0.2) < 4.5 * math.sqrt(0.2 * 0.8 / 400)
    assert sum(vqldm.arrange(tmp_path, names[:3], 0.001)[1]) == 1       # a handful: still one

# ------------------------------------------------------------------------------------------------
# C. Commands
# ------------------------------------------------------------------------------------------------

# ---- what they write ---------------------------------------------------------------------------

TINY = "--preset tiny --device cpu --precision fp32".split()

def state_of(path):
    return torch.load(path, weights_only=True)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which train-vq and train-ldm ran, as a user types them but tiny."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)         # a clean run prints no warning
        patch.chdir(folder)
        assert cli("train-vq", *TINY, *"--lpips off --n-images 96".split()) == 0
        assert cli("train-ldm", *TINY, "--epochs", 2) == 0
    return folder

@pytest.fixture()
def here(trained, monkeypatch, tmp_path):
    """Work in that folder -> a new folder for what is written."""
    monkeypatch.chdir(trained)
    return tmp_path

def is_picture(path):
    im = Image.open(path).convert("RGB")
    return min(im.size) > 10 and len(im.getcolors(2**24)) > 2

def sampled(out, *words):
    """Run sample -> {name: bytes} of the pictures that it left."""
    assert cli(*"sample --steps 3 --device cpu --out".split(), out, *words) == 0
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(Path(out).rglob("*.png"))}

def read(path):
    return np.asarray(Image.open(path)).astype(int)

def make_images():
    return vqldm.Generator(vqldm.load_checkpoint("runs/ldm", ["ldm"], "--ckpt"), CPU, None, "")

@pytest.mark.parametrize("run, files, held", [
    ("vq", "last.pt best.pt pre_gan.pt data_preview.png recon_epoch_002.png codebook.png "
     "curves.png",
     "held_rec"), ("ldm", "last.pt best.pt samples_epoch_002.png curves.png", "held_loss")])
def test_training_leaves_the_files_of_the_design_and_learns(trained, run, files, held):
    for path in (trained / "runs" / run / name for name in files.split()):
        assert is_picture(path) if path.suffix == ".png" else state_of(path)["kind"] == run
    rows = list(csv.DictReader(open(trained / "runs" / run / "log.csv")))
    assert all(math.isfinite(float(v)) for row in rows for v in row.values() if v)
    losses = [float(row[held]) for row in rows if row[held]]
    assert losses[-1] < losses[0] < 1 and not list((trained / "runs" / run).glob("*.tmp"))
    score, step = min((float(row[held]) + 0.1 * float(row.get("held_lpips") or 0), int(row["step"]))
                      for row in rows if row[held])         # of the images that nobody trained on
    best = state_of(trained / "runs" / run / "best.pt")
    assert best["best"] == pytest.approx(score, rel=1e-6) and best["step"] == step

def test_same_seed_same_bytes(here):
    a, b = (sampled(here / out, "--n", 2, "--seed", 5) for out in "ab")
    c = sampled(here / "c", "--n", 2, "--seed", 6, "--no-trajectory")
    assert a == b and {"grid.png", "trajectory.png"} < set(a) and len(a) == 4
    assert all(is_picture(here / "a" / name) for name in a)
    assert not set(c.values()) & set(a.values())

def test_classes_are_sampled_in_the_proportions_of_the_training_set(here):
    """Of the first n samples each class has its share, to within three, however many n are."""
    make = make_images()
    make.classes, make.class_counts = list("abc"), [70, 25, 5]
    drawn = F.one_hot(make.labels(range(300)), 3).cumsum(0)                  # (n,3)
    share = torch.arange(1, 301)[:, None] * torch.tensor([0.70, 0.25, 0.05])
    assert (drawn - share).abs().max() < 3

def test_sample_number_i_is_the_same_whatever_n_is(here):
    """Its noise is its own, in any batch; so is its class."""
    make = make_images()
    a, b = make.noise_of(5, [7, 33])()
    assert torch.equal(b, make.noise_of(5, [33])()[0]) and not torch.equal(a, b)
    assert make.labels([7, 33])[1] == make.labels(range(34))[33]
    few, many = (sampled(here / str(n), "--n", n, "--no-trajectory") for n in (3, 34))
    assert len(few) == 4 and len(many) == 35
    for name in few.keys() - {"grid.png"}:
        a, b = read(here / "3" / name), read(here / "34" / name)
        assert abs(a - b).max() <= 1 and a.std() > 1

def test_class_all_makes_a_folder_that_can_be_trained_on(here, load):
    files = sampled(here / "made", "--class", "all", "--n", 3, "--guidance", 2, "--no-trajectory")
    images = load(here / "made")
    assert {"grid.png", "guidance.png"} < set(files)
    assert images.classes == sorted(vqldm.SYNTHETIC_CLASSES)
    assert torch.bincount(images.labels).tolist() == [3] * 4

def test_a_class_may_have_any_name(here):
    """ISIC has 'Melanoma, NOS'; and a stranger's checkpoint must not write outside of --out."""
    names = ["Melanoma, NOS", "../../escape", "a/b", "nevus"]
    torch.save(dict(state_of("runs/ldm/last.pt"), classes=names), here / "own.pt")
    for word, n in ((names[0], 1), ("all", 4)):
        files = sampled(here / "x/y/z" / word, "--ckpt", here / "own.pt", "--class", word, "--n", 1,
                        "--no-trajectory", "--steps", 1)
        assert len(files) == n + 2                          # grid and guidance
    assert len([p for p in here.rglob("*.png") if "x/y/z" not in p.as_posix()]) == 0

def test_pictures_to_look_at_come_on_request(here, random_lpips):
    files = sampled(here / "a", *"--n 2 --interpolate --nearest --sampler ddpm --class".split(),
                    "nevus-like,melanoma-like")
    wanted = {"interpolate.png", "nearest.png", "guidance.png", "nevus-like/00000.png"}
    assert wanted < set(files) and all(is_picture(here / "a" / name) for name in wanted)

def test_pictures_to_vary_are_not_taken_for_training_images(here, capsys):
    """Nothing trains on them: no split, no word of learning by heart; and the flag is theirs."""
    sampled(here / "a", "--n", 2, "--from", fill(here / "own", ["a.png", "b.png"]))
    said = capsys.readouterr().out
    assert "2 images to vary; classes: images 2" in said and "by heart" not in said
    assert cli("sample", "--from", "nowhere", "--out", here / "b") == 2
    assert "--from nowhere: no such folder" in capsys.readouterr().err

def test_only_typed_steps_can_be_too_many(here, capsys, monkeypatch):
    """T may be smaller than the default of --steps: then T of them are made."""
    load = vqldm.load_checkpoint

    def short(*a):
        state = load(*a)
        state["config"].update(T=12)
        return state
    monkeypatch.setattr(vqldm, "load_checkpoint", short)
    assert cli(*"sample --n 2 --device cpu --no-trajectory --out".split(), here / "a") == 0
    assert "dpm, 12 steps" in capsys.readouterr().out
    for command in ("sample", "evaluate"):
        assert cli(command, "--ckpt", "runs/ldm", "--steps", 13, "--out", here / command) == 2
        assert "--steps 13: at most T = 12 of this model" in capsys.readouterr().err

def test_seed_is_of_the_samples_not_of_the_images_that_they_are_compared_with(here, monkeypatch):
    """--seed 7 must not draw other training images; nor may --from be taken for them."""
    seen = []
    monkeypatch.setattr(vqldm, "draw_nearest", lambda path, x, images, *a: seen.append(images.key))
    monkeypatch.setattr(vqldm, "load_perceptual", lambda *a: (None, "off"))
    for i, words in enumerate(("--seed 0", "--seed 7", f"--from {fill(here / 'own', ['a.png'])}")):
        sampled(here / str(i), *words.split(), *"--n 2 --nearest --no-trajectory".split())
    assert seen == [state_of("runs/ldm/last.pt")["data"]] * 3

def test_strength_is_how_far_sample_leaves_the_images_that_it_varies(here, load, monkeypatch):
    """Almost not at all: they come out as the VQGAN's reconstructions. Fully: from noise alone. The
    noise that is put on them is not the one that the first step adds."""
    images = vqldm.load_images(str(fill(here / "own", [f"{i}.png" for i in range(4)])), 32, 1, 0.1,
                               vqldm.VQConfig(cache=str(here)))
    make, error, noises = make_images(), {}, []
    own = make.decode(make.encode(images.batch(range(4)))).permute(0, 2, 3, 1).numpy()
    add, walk = Diffusion.add_noise, Diffusion.sample

    def watch_add(self, z0, t, eps):
        noises.append(eps)
        return add(self, z0, t, eps)

    def watch_walk(self, net, z, steps, sampler, eta, noise, levels):
        return walk(self, net, z, steps, sampler, eta,
                    lambda: (noises.append(noise()), noises[-1])[1], levels)
    monkeypatch.setattr(Diffusion, "add_noise", watch_add)
    monkeypatch.setattr(Diffusion, "sample", watch_walk)
    for strength in (0, 0.5, 1):
        sampled(out := here / str(strength), "--class", "nevus-like", "--n", 4, "--no-trajectory",
                "--from", here / "own", "--cache", here, "--strength", strength, "--sampler",
                "ddim", "--eta", 1)
        error[strength] = sum(abs(read(out / f"{i:05d}.png") - own[i]).mean() for i in range(4)) / 4
        one, *rest = noises[:3]             # at strength 0 there is a single step, without noise
        noises.clear()
        assert not any(torch.equal(one, other) for other in rest)
    assert error[0] < 3 and error[0] < error[0.5] < error[1]

def test_evaluate_writes_the_flat_numbers_of_the_design(here, random_lpips):
    numbers = {}
    for stage, second in (("vq", "recon"), ("ldm", "samples")):
        for n in 8, 7:      # pictures of the first are gone after the second
            assert cli(*f"evaluate --ckpt runs/{stage} --n {n} --steps 2 --device cpu".split(),
                       "--out", here / stage, "--save-images", here / "png") == 0
        numbers[stage] = json.loads((here / stage / "metrics.json").read_text())
        assert is_picture(here / stage / "evaluate.png")
        assert [len(list((here / "png" / name).iterdir())) for name in ("real", second)] == [7, 7]
    vq, ldm = numbers.values()
    assert list(vq) == "psnr ssim lpips codes_used_percent perplexity n".split() and vq["n"] == 7
    assert list(ldm)[:7] == ("frechet kernel frechet_real frechet_recon latent_mean latent_std "
                             "n").split() and ldm["n"] == 7
    assert all(math.isfinite(v) for m in (vq, ldm) for v in m.values())
    assert 0 < vq["codes_used_percent"] <= 100 and 1 <= vq["perplexity"] <= 64

def test_a_perfect_stage_2_scores_as_copies_of_other_images(here, random_lpips, monkeypatch):
    """With a VQGAN that loses nothing copies of the held-out images are at distance 0 from them;
    a perfect stage 2 is where real images are."""
    measure = vqldm.measure_vq
    monkeypatch.setattr(vqldm, "measure_vq", lambda *a: (*(m := measure(*a))[:3], m[2]))
    assert cli(*"evaluate --ckpt runs/ldm --n 7 --steps 2 --no-use-test --out".split(), here) == 0
    m = json.loads((here / "metrics.json").read_text())
    assert abs(m["frechet_recon"]) < 0.01 * m["frechet_real"] == 0.01 * m["frechet_perfect"]

@pytest.mark.parametrize("kind, lo, hi", [("real ones", 60, 101), ("noise", 0, 45)])
def test_the_use_test_tells_good_samples_from_worthless_ones(random_lpips, capsys, kind, lo, hi):
    """Oracles: a generator that copies training images is as good as they are, and recognised; one
    that makes noise is worth nothing. Only samples of the rarer classes join the real ones. Each
    set is fitted three times, with seeds of their own: the spread."""
    images = vqldm.load_images("synthetic", 32, 480, 0.3, vqldm.VQConfig(cache="runs/cache"))
    rare = (images.labels[images.train] == 0) & (torch.arange(len(images.train)) % 8 > 0)
    images.train, sets, fit = images.train[~rare], {}, vqldm.linear_classifier

    def many(cfg, numbers, label):
        rows = [images.train[images.labels[images.train] == c][int(i) % 12]
                for i, c in zip(numbers, label)]
        x = images.rows(torch.stack(rows))
        return (x if kind == "real ones" else vqldm.to_bytes(randn(*x.shape))), None

    def watch(f, y, n_classes, seed):
        sets[len(sets), seed] = torch.bincount(y, minlength=n_classes).tolist()
        return fit(f, y, n_classes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqldm, "linear_classifier", watch)
        m = vqldm.use_test(types.SimpleNamespace(classes=images.classes, many=many), images, images,
                           images.held, vqldm.Perceptual("squeeze", CPU),
                           vqldm.EvaluateConfig(n=40))
    assert lo <= m["use_made"] <= hi and m["use_real"] > 70
    assert lo <= m["recognised_percent"] <= hi
    assert [seed for _, seed in sets] == [0, 1, 2] * 3
    real, made, both = list(sets.values())[::3]
    assert made == [20] * 4 and [b - r for b, r in zip(both, real)] == [20, 0, 0, 0]
    assert "classifier trained on made" in capsys.readouterr().out

def test_a_classifier_weighs_each_class_the_same():
    """Two Gaussians of unit width, 2 apart, 20 times as many of one: the border lies half way, not
    where least squares without weights would put it, which gives nearly all to the larger one."""
    f = torch.cat([randn(2000, 3), randn(100, 3, key=1) + torch.tensor([2.0, 0, 0])]).double()
    judge = vqldm.linear_classifier(f, torch.arange(2100) // 2000, 2, 0)
    line = torch.stack([torch.linspace(-1, 3, 401), torch.zeros(401), torch.zeros(401)], 1).double()
    border = float(line[400 - int(judge(line).sum()), 0])
    assert abs(border - 1) < 0.25

def test_evaluate_works_without_lpips(here, monkeypatch):
    monkeypatch.setattr(vqldm, "load_perceptual", lambda *a: (None, "off"))
    for stage, missing in (("vq", "lpips"), ("ldm", "frechet")):
        assert cli(*f"evaluate --ckpt runs/{stage} --n 8 --steps 1 --out".split(), here) == 0
        assert json.loads((here / "metrics.json").read_text())[missing] is None

def test_evaluate_asks_for_no_covariance_of_a_single_image(here, random_lpips, monkeypatch):
    """It would be NaN, whose eigenvalues crash LAPACK, and with it Python."""
    sizes, distance = [], vqldm.frechet
    monkeypatch.setattr(vqldm, "frechet", lambda a, b: (
        sizes.append(min(len(a), len(b))), 0.0 if sizes[-1] < 2 else distance(a, b))[1])
    assert cli(*"evaluate --ckpt runs/ldm --steps 1 --no-use-test --out".split(), here, "--data",
               fill(here / "few", ["1.png"]), "--cache", here) in (0, 2) and 1 not in sizes

# ---- the measures are what they are called -----------------------------------------------------

def test_frechet_distance_of_known_gaussians():
    """‖Δmean‖² + tr(A + B - 2√(AB)): a shift costs its length squared, doubling costs tr(A)."""
    a = randn(500, 6).double() @ randn(6, 6, key=1).double()
    a -= a.mean(0)
    for b, want in ((a, 0), (a + torch.arange(6), 55), (2 * a, float(a.T.cov().trace()))):
        assert vqldm.frechet(a, b) == pytest.approx(want, rel=1e-6, abs=1e-6)

def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    a, b = randn(5, 3).double(), randn(4, 3, key=1).double() + 1

    def mean(pairs):
        return np.mean([float((u @ v / 3 + 1) ** 3) for u, v in pairs])
    want = mean(itertools.permutations(a, 2)) + mean(itertools.permutations(b, 2)) \
        - 2 * mean(itertools.product(a, b))
    assert vqldm.kernel_distance(a, b) == pytest.approx(want)

def test_ssim_is_1_for_the_same_image_and_falls_with_noise():
    u = vqldm.synthetic(4, 32, 0)[0] / 255
    scores = [float(vqldm.ssim(u, u + s * randn(*u.shape))) for s in (0, 0.02, 0.1, 0.5)]
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores == sorted(scores, reverse=True)
    a, b = (torch.full((1, 3, 32, 32), v) for v in (0.4, 0.6))         # only luminance differs
    assert float(vqldm.ssim(a, b)) == pytest.approx((0.48 + 1e-4) / (0.52 + 1e-4), rel=1e-3)

# ---- what they refuse --------------------------------------------------------------------------

@pytest.fixture()
def refused(capsys):
    """refused(words) -> the one sentence on stderr with which the command ends, status 2."""
    def call(*words):
        capsys.readouterr()
        assert cli(*words) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and text.splitlines()[-1].startswith("vqldm: ")
        return text.splitlines()[-1]            # before it, if anything, a progress line
    return call

def test_sample_refuses_what_it_cannot_do(here, refused):
    for words, told in (("--class nevus", "--class nevus"), ("--steps 201", "--steps 201"),
                        ("--ckpt runs/vq", "train-vq"), ("--ckpt nowhere", "--ckpt nowhere"),
                        ("--ckpt runs/vq/log.csv", "--ckpt runs/vq/log.csv")):
        assert told in refused("sample", "--out", here / "out", *words.split())
    assert "--vq runs/ldm" in refused("train-ldm", "--vq", "runs/ldm", "--out", here / "ldm")
    assert not (here / "out").exists()
    fill(here / "out", ["00000.png"])
    assert "--overwrite" in refused("sample", "--out", here / "out")

class Code:
    """Pickled, this is an order to make a folder."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)

BROKEN = {          # name: what it holds, made from (bytes of a whole one, its state, bad code)
    "cut": lambda b, s, c: b[:len(b) // 2], "empty": lambda b, s, c: b"",
    "text": lambda b, s, c: b"hello", "a list": lambda b, s, c: [1, 2],
    "bare code": lambda b, s, c: pickle.dumps(c, 2), "code inside": lambda b, s, c: dict(s, more=c),
    "4 GB": lambda b, s, c: claims(b),
    "old": lambda b, s, c: dict(s, format=0), "foreign": lambda b, s, c: dict(weights=s["ema"]),
    "wild": lambda b, s, c: dict(s, config=dict(s["config"], T=10**9)),
    "giant": lambda b, s, c: dict(s, config=dict(s["config"], unet_widths=(4096, 4096))),
    **{f"odd {key}": lambda b, s, c, key=key: dict(s, **{key: None}) for key in
       ("step", "log", "scale", "classes", "class_counts")},
    "no vq model": lambda b, s, c: dict(s, vq=dict(s["vq"], model=None)),
    "flat scale": lambda b, s, c: dict(s, scale=torch.zeros(1)),
    "alien": lambda b, s, c: dict(s, config=dict(s["config"], beyond=1)),
    "small": lambda b, s, c: dict(s, ema={k: v[:1] for k, v in s["ema"].items()}),
    **{f"no {key}": lambda b, s, c, key=key: {k: v for k, v in s.items() if k != key}
       for key in ("format", "kind", "config", "ema", "scale", "classes", "vq")}}

def claims(content):
    """The directory at the end of this checkpoint, a zip file, says that its parts have 4 GB."""
    content, at = bytearray(content), content.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<II", content, at + 20, 0xfffffff0, 0xfffffff0)
        at = content.find(b"PK\x01\x02", at + 1)
    return bytes(content)

@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_not_ours_or_not_whole_is_refused_and_runs_no_code(here, refused, name):
    path, trace = Path("runs/ldm/last.pt"), here / "made by the checkpoint"
    content = BROKEN[name](path.read_bytes(), state_of(path), Code(trace))
    if isinstance(content, bytes):
        (here / "bad.pt").write_bytes(content)
    else:
        torch.save(content, here / "bad.pt")
    assert "bad.pt" in refused("sample", "--ckpt", here / "bad.pt", "--out", here / "out")
    assert not trace.exists() and not (here / "out").exists()

def test_a_checkpoint_that_claims_more_than_it_holds_is_not_even_read(here, refused, monkeypatch):
    """Reading it would take the memory that it claims, before it is refused."""
    (here / "bad.pt").write_bytes(claims(Path("runs/ldm/last.pt").read_bytes()))
    monkeypatch.setattr(torch, "load", lambda *args, **kw: pytest.fail("it was read"))
    assert "bad.pt" in refused("sample", "--ckpt", here / "bad.pt", "--out", here / "out")

def test_a_run_is_not_touched_by_one_that_was_not_meant_for_it(trained, monkeypatch, refused):
    monkeypatch.chdir(trained)
    before = {p: p.read_bytes() for p in Path("runs").glob("*/*.*")}
    assert "--overwrite" in refused("train-vq", *TINY) and "--resume" in refused("train-ldm", *TINY)
    said = refused("train-vq", *TINY, *"--resume --codes 32 --seed 1 --size 32".split())
    assert all(w in said for w in ("--codes", "64", "32", "--seed")) and "--size" not in said
    lock = vqldm.lock_folder(Path("runs/vq"))               # as a run that is under way holds it
    assert "another" in refused("train-vq", *TINY, "--overwrite")
    lock.release()
    assert before == {p: p.read_bytes() for p in before}

@pytest.mark.parametrize("words", ["train-vq --data nowhere", "train-vq --device cuda:77",
                                   "train-ldm --vq nowhere", "train-ldm --unet-widths 8 8 8 8 8"])
def test_a_run_that_cannot_start_leaves_the_one_it_would_replace(
        trained, tmp_path, monkeypatch, refused, words):
    """--overwrite takes away the old run once the new one really begins, not before its checks."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    refused(*words.split(), "--overwrite")
    assert Path("runs/vq/last.pt").exists() and Path("runs/ldm/last.pt").exists()

def test_no_command_deletes_files_that_are_not_its_own(tmp_path, monkeypatch):
    """Even if all of them write into the folder with the photographs."""
    monkeypatch.chdir(tmp_path)
    no_pictures(monkeypatch)
    mine = fill(tmp_path / "mine", ["photo.png", "another.png"])
    table(mine, [dict(isic_id="photo")])
    for name in ("notes.json", "weights.pt"):
        (mine / name).touch()
    before = set(mine.iterdir())
    for more in ([], ["--overwrite"]):
        assert cli(*SMALL_VQ, "--epochs", 1, "--data", mine, "--out", mine, *more) == 0
    assert cli("train-ldm", *SMALL, *"--T 10 --unet-widths 8 --epochs 1".split(), "--vq", mine) == 0
    assert cli(*"sample --n 1 --steps 1 --overwrite --out".split(), mine) == 0
    assert before <= set(mine.iterdir())

# ---- stopped, killed, resumed ------------------------------------------------------------------

STAGES = {"vq": [*SMALL_VQ, *"--epochs 3 --gan-start 1 --d-warmup .4 --revive-every 4".split()],
          "ldm": ["train-ldm", *SMALL, *"--T 10 --unet-widths 8 --vq calm/vq --epochs 3".split()]}
# Muon enlarges what is smallest in a gradient, and so its rounding: after 17 steps sums in another
# order differ by 1e-3 with it, on some machines, by 1e-6 without it.
ALIKE = {"adam": [*STAGES["vq"], "--muon-lr", "0"], "ldm": STAGES["ldm"]}

@pytest.fixture(scope="session")
def calm_folder(tmp_path_factory):
    """A folder in which both stages ran undisturbed, 17 steps each; the GAN began at step 6. adam:
    the first stage without Muon."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.chdir(folder)
        for stage, words in {**STAGES, **ALIKE}.items():
            assert cli(*words, "--out", f"calm/{stage}") == 0
    return folder

@pytest.fixture()
def calm(calm_folder, monkeypatch):
    no_pictures(monkeypatch)
    monkeypatch.chdir(calm_folder)

def same(a, b):
    """Equal bit for bit, through lists and dicts; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b

def assert_same_run(a, b):
    """The same checkpoints, in all but the settings of this session and its speed; the same log."""
    names = {p.name for p in Path(a).glob("*.pt")}
    assert names == {p.name for p in Path(b).glob("*.pt")}
    for name in names:
        one, two = state_of(Path(a, name)), state_of(Path(b, name))
        for part in one.keys() - {"config", "speed"}:
            assert same(one[part], two[part]), (name, part)
    assert Path(a, "log.csv").read_bytes() == Path(b, "log.csv").read_bytes()

def stop_at(patch, step, *signals):
    """Like a user's Ctrl-C in the middle of this step."""
    indices = vqldm.Run.indices

    def asked(self):
        for number in signals if self.step == step else ():
            signal.raise_signal(number)
        return indices(self)
    patch.setattr(vqldm.Run, "indices", asked)

def test_who_moves_kernels_by_muon(calm, tmp_path):
    """Stage 1 does, its critic never, stage 2 only if it is told to."""
    def rates(path, part):
        return [g["initial_lr"] for g in state_of(path)[part]["param_groups"] if g["muon"]]
    assert rates("calm/vq/last.pt", "opt") == [vqldm.VQConfig.muon_lr]
    assert not rates("calm/vq/last.pt", "opt_d") and not rates("calm/ldm/last.pt", "opt")
    assert cli(*STAGES["ldm"], "--muon-lr", 0.01, "--minutes", 1e-9, "--out", tmp_path) == 0
    assert rates(tmp_path / "last.pt", "opt") == [0.01]

def test_first_weights_do_not_depend_on_whether_lpips_can_be_had(calm, tmp_path, monkeypatch):
    """Loading it draws random numbers; here as many, and no loss."""
    monkeypatch.setattr(vqldm, "load_perceptual", lambda *a: (torch.rand(9), (None, "off"))[1])
    assert cli(*STAGES["vq"], "--out", tmp_path) == 0
    assert same(state_of(tmp_path / "last.pt")["model"], state_of(Path("calm/vq/last.pt"))["model"])

@pytest.mark.parametrize("stage, step, number", [
    ("vq", 0, signal.SIGINT), ("vq", 3, signal.SIGTERM), ("vq", 5, signal.SIGINT),
    ("vq", 6, signal.SIGINT), ("vq", 12, signal.SIGTERM), ("ldm", 0, signal.SIGTERM),
    ("ldm", 9, signal.SIGINT)])
def test_stopped_and_resumed_is_bit_for_bit_the_undisturbed_run(
        calm, tmp_path, monkeypatch, capsys, stage, step, number):
    """Weights, optimisers, EMA, best checkpoint and log; before, at and after the GAN's start. The
    step in hand is finished; the exit status is the signal's; --resume needs no other flag."""
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        assert cli(*STAGES[stage], "--out", tmp_path) == 128 + number
    assert "--resume" in capsys.readouterr().out
    assert state_of(tmp_path / "last.pt")["step"] == step + 1
    assert cli(STAGES[stage][0], "--resume", "--out", tmp_path) == 0
    assert_same_run(f"calm/{stage}", tmp_path)

def test_a_second_ctrl_c_ends_at_once(calm, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a job in the background
    assert cli(*STAGES["ldm"], "--out", tmp_path) == 130                # was told to ignore it
    assert not (tmp_path / "last.pt").exists()
    signal.signal(signal.SIGINT, before)

def test_minutes_end_a_run_early_saved_and_at_rest(calm, tmp_path, monkeypatch):
    """The learning rate has come down by then, as at the end of all epochs. It measures once a
    minute (five times in a longer run), and at the step where it ends."""
    clock = itertools.count()                       # each look at the clock finds a second gone
    monkeypatch.setattr(vqldm.time, "monotonic", lambda: float(next(clock)))
    assert cli(*STAGES["ldm"], "--epochs", 10**5, "--minutes", 1.5, "--out", tmp_path) == 0
    state = state_of(tmp_path / "last.pt")
    looks = [row["step"] for row in state["log"] if "held_loss" in row]
    assert 10 < looks[0] < looks[1] == state["step"] < 90 and len(looks) == 2
    assert state["opt"]["param_groups"][0]["lr"] < 0.1 * vqldm.LDMConfig().lr

def test_a_run_that_replaced_another_can_be_resumed_and_so_can_a_finished_one(
        calm, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGINT)
        cli(*STAGES["ldm"], "--out", tmp_path, "--overwrite")
    assert cli("train-ldm", "--resume", "--out", tmp_path) == 0
    assert "nothing left to do" not in capsys.readouterr().out
    assert cli("train-ldm", "--resume", "--out", tmp_path) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert_same_run("calm/ldm", tmp_path)

def test_the_guide_stays_young_when_a_run_goes_on(calm, tmp_path, monkeypatch):
    """It was kept at 60 % of the first epochs. Twice as many, of which these are half, let the
    network grow, but not the guide."""
    monkeypatch.setattr(vqldm, "GUIDE_STEPS", 0)
    assert cli(*STAGES["ldm"], "--guide-age", 0.6, "--out", tmp_path) == 0
    old = state_of(tmp_path / "last.pt")
    assert not same(old["guide"], old["ema"]) and not old["guide_grows"]
    epochs = 2 * old["config"]["epochs"]
    assert cli("train-ldm", "--resume", "--epochs", epochs, "--out", tmp_path) == 0
    new = state_of(tmp_path / "last.pt")
    assert same(new["guide"], old["guide"]) and not same(new["ema"], old["ema"])

def test_resume_checks_the_settings_that_it_goes_on_with(tmp_path, monkeypatch, capsys):
    """34 pixels fit the one width of this run, not the default's two. And photographs that changed
    since are said: it is another run now."""
    no_pictures(monkeypatch)
    photos = fill(tmp_path / "photos", [f"{i}.png" for i in range(9)])
    words = [*SMALL_VQ, *"--size 34 --widths 8 --d-widths 8 --epochs 1 --data".split(), photos]
    assert cli(*words, "--out", tmp_path / "a") == 0
    resume = "train-vq", "--resume", "--size", 34, "--epochs", 2, "--out"
    assert cli(*resume, tmp_path / "none") == 2 and "multiple of f = 4" in capsys.readouterr().err
    assert cli(*resume, tmp_path / "a") == 0 and "WARNING the image" not in capsys.readouterr().out
    fill(photos, ["new.png"])
    assert cli(*resume[:-2], 3, "--out", tmp_path / "a") == 0
    assert "WARNING the image files were changed" in capsys.readouterr().out

def test_last_pt_is_written_after_the_checkpoints_that_it_knows_of(calm, tmp_path, monkeypatch):
    """Killed in between, resume repeats the step and writes them again; the other way round the
    best checkpoint would be lost for good."""
    written, write = [], vqldm.write_whole
    monkeypatch.setattr(vqldm, "write_whole", lambda path, f: (
        written.append(path.name), write(path, f)))
    assert cli(*STAGES["vq"], "--out", tmp_path) == 0
    last_of_save = [a for a, b in itertools.pairwise(written) if a[-3:] == ".pt" and b == "log.csv"]
    assert {"best.pt", "pre_gan.pt"} < set(written) and set(last_of_save) == {"last.pt"}

def nan_at(patch, *steps):
    """A batch of NaN at these steps of this session."""
    batch, n = vqldm.Images.batch, itertools.count()

    def spoiled(self, indices, turns=None):
        x = batch(self, indices, turns)
        return x * math.nan if turns is not None and next(n) in steps else x
    patch.setattr(vqldm.Images, "batch", spoiled)

@pytest.mark.parametrize("step", [4, 9])
def test_one_bad_batch_is_skipped(calm, tmp_path, monkeypatch, capsys, step):
    moved, update = [], vqldm.Run.update

    def watch(self, optimizer, params, losses):
        old = [p.detach().clone() for p in params]
        done = update(self, optimizer, params, losses)
        moved.append((self.step, done, not all(map(torch.equal, old, params))))
        return done
    nan_at(monkeypatch, step)
    monkeypatch.setattr(vqldm.Run, "update", watch)
    assert cli(*STAGES["vq"], "--out", tmp_path) == 0
    assert [m for m in moved if m[1:] != (True, True)] == [(step, False, False)]
    assert f"step {step}: rec" in capsys.readouterr().out
    state = state_of(tmp_path / "last.pt")
    assert state["step"] == 17 and all(w.isfinite().all() for w in state["model"].values())

def test_five_bad_batches_in_a_row_end_the_run_and_name_the_term(
        calm, tmp_path, monkeypatch, refused):
    with monkeypatch.context() as patch:
        stop_at(patch, 8, signal.SIGINT)
        cli(*STAGES["vq"], "--out", tmp_path)
    good = (tmp_path / "last.pt").read_bytes()
    nan_at(monkeypatch, *range(1, 99))
    said = refused("train-vq", "--resume", "--out", tmp_path)
    assert "rec" in said and "--lr" in said and (tmp_path / "last.pt").read_bytes() == good

PAIR = """
import os, sys
import torch, vqldm
torch.set_num_threads(1)
for name in ("draw_rows", "draw_curves", "draw_usage"):
    setattr(vqldm, name, lambda *a, **kw: None)
step, number, indices = int(sys.argv[1]), int(sys.argv[2]), vqldm.Run.indices
def asked(self):                        # in this step the last process gets this signal
    if self.step == step and vqldm.rank() == 1:
        os.kill(os.getpid(), number)
    return indices(self)
vqldm.Run.indices = asked
vqldm.main(sys.argv[3:])
"""

def two(folder, *words, step=-1, number=0, **env):
    """The command, in two processes of torchrun."""
    (folder / "pair.py").write_text(PAIR)
    env["PYTHONPATH"] = str(HERE)
    return run_python(*"-m torch.distributed.run --standalone --nproc-per-node 2".split(),
                      folder / "pair.py", step, number, *words, cwd=".", **env)

def assert_nearly_same_run(a, b):
    """Sums in another order, and nothing else: weights and log differ in the last digits."""
    one, two = state_of(Path(a, "last.pt")), state_of(Path(b, "last.pt"))
    assert one["step"] == two["step"] == 17
    for part in one.keys() & {"model", "disc", "ema"}:
        for name, w in one[part].items():
            assert torch.allclose(w, two[part][name], rtol=1e-3, atol=1e-5), (part, name)
    one, two = (list(csv.DictReader(open(Path(run, "log.csv")))) for run in (a, b))
    assert len(one) == len(two) > 3
    for row, other in zip(one, two):
        values = [{k: float(v) for k, v in r.items() if v} for r in (row, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)

@pytest.mark.parametrize("stage, first, then", [("adam", 2, 2), ("adam", 2, 1), ("ldm", 1, 2)])
def test_two_processes_do_what_one_does_and_can_take_over_from_it(
        calm, tmp_path, monkeypatch, stage, first, then):
    """Same batches, weights, log; a run that two began (the wish to stop reaches one of them) is
    ended by one, and the other way round."""
    words, cut = [*ALIKE[stage], "--out", tmp_path, "--cache", tmp_path / "cache"], 9
    if first == then:
        assert (done := two(tmp_path, *words)).returncode == 0, done.stderr
        return assert_nearly_same_run(f"calm/{stage}", tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, cut, signal.SIGTERM)
        assert (cli(*words) if first == 1 else
                two(tmp_path, *words, step=cut, number=signal.SIGTERM).returncode)
    assert state_of(tmp_path / "last.pt")["step"] == cut + 1
    if then == 1:
        assert cli(*words, "--resume") == 0
    else:
        assert (done := two(tmp_path, *words, "--resume")).returncode == 0, done.stderr
    assert_nearly_same_run(f"calm/{stage}", tmp_path)

def test_a_mistake_in_two_processes_is_told_once(calm, tmp_path):
    done = two(tmp_path, "train-vq", "--data", "nowhere", "--out", tmp_path / "out")
    assert done.returncode and "[rank" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "vqldm: " in line] == [
        "vqldm: --data nowhere: no such folder; a folder of images or 'synthetic'"]

def test_balance_draws_each_class_equally_often(calm, tmp_path, monkeypatch):
    """27 and 3 images: half of the draws each. A class may have none: a single lesion of a kind may
    fall to the held-out side."""
    for part, c, n in (("train", "a", 27), ("train", "c", 3), ("test", "a", 3), ("test", "b", 3)):
        fill(tmp_path / "x" / part / c, [f"{i}.png" for i in range(n)])
    more, seen, loss = ["--cache", tmp_path, "--out"], [], Diffusion.loss

    def watch(self, net, z0, t, eps, label=None):
        if torch.is_grad_enabled():
            seen.extend(label[label < 3].tolist())          # 3: hidden
        return loss(self, net, z0, t, eps, label)
    monkeypatch.setattr(Diffusion, "loss", watch)
    no_pictures(monkeypatch)
    assert cli(*SMALL_VQ, "--data", tmp_path / "x", *more, tmp_path / "vq") == 0
    words = ["--balance", "--unet-widths", 8, "--T", 10, "--epochs", 20, "--vq", tmp_path / "vq"]
    assert cli("train-ldm", *SMALL, *words, *more, tmp_path / "ldm") == 0
    assert state_of(tmp_path / "ldm/last.pt")["class_counts"] == [27, 0, 3]
    share = seen.count(2) / len(seen)
    assert set(seen) == {0, 2} and abs(share - 0.5) < 4.5 * math.sqrt(0.25 / len(seen)) < 0.12

def test_demo_hands_on_what_it_was_told(monkeypatch):
    seen, run = [], vqldm.run_command
    monkeypatch.setattr(vqldm, "run_command", lambda words: seen.append(words) or 0)
    assert run(["demo", "--allow-bad", "--overwrite", "--seed", "3", "--out", "x"]) == 0
    assert [words[0] for words in seen] == ["train-vq", "train-ldm", "sample"]
    for words in seen:
        vqldm.parse_command(words)
        assert {"--allow-bad", "--overwrite", "--seed", "3"} < set(words)

def test_two_processes_go_on_without_the_weights_of_lpips(calm, tmp_path):
    """Both of them, at once: the second waits for the first to load them, even if that fails."""
    words = [w for w in map(str, STAGES["vq"]) if w not in ("--lpips", "off")]
    done = two(tmp_path, *words, "--out", tmp_path, "--minutes", 1, TORCH_HOME=str(tmp_path),
               http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert done.returncode == 0 and done.stdout.count("WITHOUT LPIPS: training") == 1
    assert state_of(tmp_path / "last.pt")["lpips"] == "off"

@pytest.mark.parametrize("command", ["sample", "demo", "evaluate", "bench"])
def test_only_training_runs_in_many_processes(command, monkeypatch):
    monkeypatch.setattr(vqldm, "world", lambda: 2)
    with pytest.raises(UserError, match="runs in one process"):
        vqldm.run_command([command])

class Here:
    """A process pool that works in this process."""
    def __init__(self, *a):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass

    def submit(self, f, *a):
        return types.SimpleNamespace(result=lambda: f(*a))

def test_bench_forecasts_a_run(tmp_path, monkeypatch, capsys):
    """Images / speed: stage 1's epochs from gan_start on with the GAN, stage 2 with its views."""
    speed = {"VQGAN": 10, "VQGAN with GAN": 5, "UNet": 30, "draw": 20, "encode": 60, "decode": 1,
             "sample": 1}
    asked = []

    def timed(cfg, part, words):
        asked.append((part, cfg.precision))
        assert words[words.index("--precision") + 1] == cfg.precision
        if words[0] in vqldm.COMMANDS:
            _, _, typed = vqldm.parse_command(words)
            assert typed["batch_size"] == (4 if words[0] == "train-vq" else 16)
        return (speed[part] * (1 if cfg.precision == "auto" else 0.5), 1.5), ["WARNING once"]
    monkeypatch.setattr(vqldm, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(vqldm, "timed", timed)
    assert cli("bench", "--out", tmp_path, "--vq-flags=--n-images 1200 --held-out .5 --epochs 10 "
               "--gan-start 8 --batch-size 4",
               "--ldm-flags=--views 2 --epochs 6 --batch-size 16") == 0
    assert asked == [(part, precision) for part in speed for precision in ("auto", "fp32")]
    out = capsys.readouterr().out       # 1200 images: 1 min draw, 600: 8 + 2·2 min, 2·⅓ + 6·⅓ min
    assert "600 training images: about 1.0 min of drawing, 12.0 of stage 1, 2.7 of stage 2" in out
    assert out.count("2.00x      1.50 GB") == 7 and out.count("WARNING once") == 1
    assert json.loads((tmp_path / "bench.json").read_text())["UNet, fp32"] == [15.0, 1.5]

@pytest.mark.parametrize("part", ["draw", "encode", "decode", "sample"])
def test_bench_times_the_part_that_it_names(part, calm, monkeypatch):
    """Once to get warm, then at least once by the clock; here each of 32 images takes 1/8 s."""
    calls, now = [], [0.0]

    def work(self_or_n, *a):
        calls.append(part)
        now[0] += 4
        return torch.zeros(32)
    if part == "draw":
        first = vqldm.synthetic(32, 32, 0)
        monkeypatch.setattr(vqldm, "synthetic", lambda *a: (work(*a), first)[1])
    else:
        monkeypatch.setattr(vqldm.Generator, part if part != "sample" else "many", work)
    monkeypatch.setattr(vqldm.time, "monotonic", lambda: now[0])
    (speed, memory), warned = vqldm.timed(vqldm.BenchConfig(minutes=0.1), part, ["calm/ldm"])
    assert speed == (8 if part != "draw" else 4) and memory > 0 and not warned
    assert len(calls) == (3 if part != "draw" else 4)       # 32 are drawn in two halves

def test_bench_says_which_flags_it_cannot_read(tmp_path):
    with pytest.raises(UserError, match="--vq-flags, --ldm-flags: No closing quotation"):
        vqldm.run_command(["bench", "--vq-flags='--size 64", "--out", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists()

def test_bench_tells_a_part_that_ran_out_of_memory(tmp_path, monkeypatch, capsys):
    """The system kills such a process without a word: what is left is a broken pool."""
    class Broken(Here):
        def submit(self, *a):
            raise BrokenProcessPool("A process in the process pool was terminated abruptly")
    monkeypatch.setattr(vqldm, "ProcessPoolExecutor", Broken)
    with pytest.raises(SystemExit, match="2"):
        vqldm.main(["bench", "--out", str(tmp_path)])
    assert "out of memory; a smaller --batch-size" in capsys.readouterr().err

def test_much_attention_is_told(capsys, tmp_path):
    """Up to 4,096 tokens, 256×256 at f = 4, it is the smaller part of a step."""
    for size, told in ((130, 1), (128, 0)):
        cli("train-vq", "--preset", "tiny", "--size", size, "--n-images", 8, "--widths", 4,
            "--minutes", 1e-9, "--lpips", "off", "--out", tmp_path / str(told))
        assert capsys.readouterr().out.count("attention over 4,225 tokens") == told

def test_best_is_kept_when_a_look_scores_lower_than_all_before():
    run, wanted = object.__new__(vqldm.Run), []
    run.best, run.looking = math.inf, 0.0
    for score in (3.0, 4.0, 2.0, 2.0, math.nan):
        names = []
        run.show(lambda score=score: score, names)
        wanted.append(names == ["best.pt"])
    assert wanted == [True, False, True, False, False] and run.best == 2.0

def test_looking_does_not_count_as_training(monkeypatch):
    """bench and the progress line tell the speed of steps, not of pictures."""
    run = object.__new__(vqldm.Run)
    run.cfg, run.first, run.step, run.looking = vqldm.VQConfig(batch_size=8), 10, 20, 0.0
    run.best = 0.0
    now = [0.0]
    monkeypatch.setattr(vqldm.time, "monotonic", lambda: now[0])
    run.began, now[0] = 0.0, 4.0
    run.show(lambda: now.__setitem__(0, 9.0) or 1.0, [])
    assert run.speed() == 8 * 10 / 4

def test_a_compiled_network_does_what_the_plain_one_does(calm, tmp_path, monkeypatch):
    """With the GAN on, whose lam walks the graph twice: compiled graphs usually bear one walk."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    assert cli(*ALIKE["adam"], "--compile", "--out", tmp_path) == 0
    assert_nearly_same_run("calm/adam", tmp_path)

def test_half_files_of_a_killed_run_are_cleared_away(calm, tmp_path):
    shutil.copytree("calm/vq", out := tmp_path / "vq")
    (out / ".last.pt.4711.tmp").write_bytes(b"half"), (out / ".mine").write_bytes(b"yours")
    assert cli("train-vq", "--resume", "--out", out) == 0
    assert not list(out.glob(".*.tmp")) and (out / ".mine").exists()

TOGETHER = """
import os, pathlib, time, vqldm
gone, alone, leave = pathlib.Path("gone"), pathlib.Path("alone"), os._exit
def run(argv):
    if vqldm.rank() == 1:
        os._exit = lambda code: (gone.touch(), leave(code))
    else:
        time.sleep(3)
        if gone.exists():
            alone.touch()
    return 0
vqldm.run_command = run
vqldm.main(["train-vq"])
"""

def test_processes_leave_together(tmp_path):
    """One that ends early closes its connections while another may still read from them."""
    (tmp_path / "together.py").write_text(TOGETHER)
    done = run_python(*"-m torch.distributed.run --standalone --nproc-per-node 2".split(),
                      "together.py", cwd=tmp_path, PYTHONPATH=str(HERE))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gone").exists() and not (tmp_path / "alone").exists()

def test_if_one_of_two_processes_is_killed_the_other_ends_soon(calm, tmp_path):
    """Not in half an hour; what was saved stays whole, and one process can go on from there."""
    began = time.monotonic()
    done = two(tmp_path, *ALIKE["adam"], "--out", tmp_path, step=9, number=signal.SIGKILL)
    assert done.returncode and time.monotonic() - began < 60 and "[rank" not in done.stderr
    assert state_of(tmp_path / "last.pt")["step"] == 6              # of the end of the first epoch
    assert cli("train-vq", "--resume", "--out", tmp_path) == 0
    assert_nearly_same_run("calm/adam", tmp_path)

KILLER = """
import json, os, random, signal, sys, time
import torch, vqldm
torch.set_num_threads(1)
vqldm.SAVE_EVERY = 0                    # a checkpoint at each step: many kills hit one half written
for name in ("draw_rows", "draw_curves", "draw_usage"):
    setattr(vqldm, name, lambda *a, **kw: None)
def start(*words):
    if pid := os.fork():
        return pid
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        vqldm.main(list(words))
        os._exit(0)
    finally:
        os._exit(1)
for stage, words in json.loads(sys.argv[2]).items():
    began, dice = time.monotonic(), random.Random(stage)
    assert os.waitpid(start(*words, "--out", f"calm/{stage}"), 0)[1] == 0
    whole = time.monotonic() - began
    for i in range(int(sys.argv[1])):       # a run that has ended is no test: always a new one
        again = [*words, "--out", f"killed/{stage}{i}", "--resume", "--cache", f"killed/cache{i}"]
        for _ in range(3):
            pid = start(*again)
            time.sleep(whole * dice.random())
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert os.waitpid(start(*again), 0)[1] == 0
"""

def run_python(*args, cwd, limit=None, **env):
    """Another Python. limit: (what, how much), as ulimit sets it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}

    def before():
        import resource
        resource.setrlimit(getattr(resource, limit[0]), (limit[1], limit[1]))
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True,
                          capture_output=True, preexec_fn=before if limit else None)

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_moment_and_resumed_is_the_undisturbed_run(tmp_path):
    """Power cuts while images are drawn, latents cached, steps made, checkpoints written."""
    long = int(os.environ.get("VQLDM_LONG") or 0)
    runs = max(7, long // 3) if long else 1
    done = run_python("-c", KILLER, runs, json.dumps(STAGES), cwd=tmp_path, PYTHONPATH=str(HERE))
    assert done.returncode == 0, done.stderr
    for stage, i in itertools.product(STAGES, range(runs)):
        assert_same_run(tmp_path / "calm" / stage, tmp_path / "killed" / f"{stage}{i}")

limits = pytest.mark.skipif(os.name == "nt", reason="needs the limits of POSIX")

def told(done):
    """The one sentence with which this process of run_python ended, status 2."""
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("vqldm: ")
    return done.stderr

@limits
@pytest.mark.parametrize("size, more", [(10_000, "--cache new"), (10_000, ""), (200_000, "")])
def test_a_full_disk_is_told_in_one_sentence_and_harms_no_checkpoint(calm, tmp_path, size, more):
    """Found out while images, a picture, a checkpoint are written. No half file is left."""
    shutil.copytree("calm/vq", out := tmp_path / "vq")
    assert "too large" in told(run_python(
        HERE / "vqldm.py", *"train-vq --resume --epochs 4 --out".split(), out, *more.split(),
        cwd=".", limit=("RLIMIT_FSIZE", size)))
    assert (out / "last.pt").read_bytes() == Path("calm/vq/last.pt").read_bytes()
    assert not list(out.glob(".*.tmp"))
    assert cli("train-vq", "--resume", "--epochs", 4, "--out", out) == 0

TIGHT = """
import resource, sys, vqldm
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
vqldm.main(sys.argv[1:])
"""

@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_too_little_memory_is_told_in_one_sentence_and_harms_no_checkpoint(
        calm, tmp_path, monkeypatch, refused):
    """At the first step of a run, and in the middle of one, of which a checkpoint exists."""
    words = [*STAGES["vq"], *"--codes 1000000 --batch-size 64 --out".split(), tmp_path / "new"]
    assert "out of memory" in told(run_python("-c", TIGHT, *words, cwd=".", PYTHONPATH=str(HERE)))
    shutil.copytree("calm/vq", out := tmp_path / "vq")
    monkeypatch.setattr(vqldm.Run, "indices", lambda run: torch.empty(2**50))
    assert "out of memory" in refused("train-vq", "--resume", "--epochs", 4, "--out", out)
    assert (out / "last.pt").read_bytes() == Path("calm/vq/last.pt").read_bytes()

# ---- who wins, and a demo ----------------------------------------------------------------------

def test_default_yields_to_preset_to_recorded_to_typed():
    cls, tiny = vqldm.VQConfig, dict(preset="tiny")
    assert vqldm.settings(cls, {}) == cls()
    assert vqldm.settings(cls, tiny).epochs == vqldm.PRESETS["tiny"][cls]["epochs"] != cls().epochs
    assert vqldm.settings(cls, dict(tiny, epochs=7)).epochs == 7
    recorded = dataclasses.asdict(vqldm.settings(cls, dict(tiny, epochs=9, codes=48)))
    resumed = vqldm.settings(cls, dict(resume=True), recorded)
    assert (resumed.epochs, resumed.codes, resumed.size, resumed.preset) == (9, 48, 32, "tiny")
    assert vqldm.settings(cls, dict(tiny, epochs=20), recorded).epochs == 20       # free to change
    with pytest.raises(UserError, match="--codes was 48, now 64"):
        vqldm.settings(cls, dict(codes=64), recorded)

def test_every_preset_is_possible_and_within_its_own_limits():
    for preset, parts in vqldm.PRESETS.items():
        for cls, values in parts.items():
            cfg = dataclasses.asdict(vqldm.settings(cls, dict(preset=preset)))
            assert values.items() <= cfg.items() and vqldm.check_values(cls, cfg) == cfg

def test_demo_is_the_three_commands_in_a_row(monkeypatch):
    ran = []
    monkeypatch.setattr(vqldm, "run_command", lambda words: ran.append(
        (words[0], vqldm.settings(*vqldm.parse_command(words)[1:]))))
    demo = vqldm.parse_command("demo --preset tiny --seed 3 --out d --data x".split())[1:]
    assert vqldm.demo(vqldm.settings(*demo), demo[1]) == 0
    assert [name for name, _ in ran] == ["train-vq", "train-ldm", "sample"]
    vq, ldm, sample = (cfg for _, cfg in ran)
    assert (vq.data, vq.preset, ldm.preset) == ("x", "tiny", "tiny")
    assert vq.out == ldm.vq and ldm.out == sample.ckpt and {vq.seed, ldm.seed, sample.seed} == {3}

# ------------------------------------------------------------------------------------------------
# D. Command line
# ------------------------------------------------------------------------------------------------
# The cases are made from the settings' own definitions: a new setting is tested from its birth.

FIELDS = [(command, cls, fd, typing.get_type_hints(cls)[fd.name])
          for command, cls in vqldm.COMMANDS.items() for fd in dataclasses.fields(cls)]

def wrong_values(fd, kind):
    m = fd.metadata
    if m["choices"]:
        return ["unheard-of", "", m["choices"][0].upper()]
    if kind is bool or kind is str:
        return ["1", "yes"] if kind is bool else ["a\0b"]
    return ["x", "", "nan", "-inf", "1e999", repr(m["lo"] - 1), repr(m["hi"] * 2),
            *(["1.5", "0x10", "1e3"] if "int" in str(kind) else ["1,5"])]

@pytest.mark.parametrize("command", vqldm.COMMANDS)
def test_every_wrong_value_is_answered_with_its_flag_and_itself(command, monkeypatch):
    monkeypatch.setattr(vqldm, "build_parser", functools.cache(vqldm.build_parser))
    cases = [(vqldm.flag(fd.name), value) for c, _, fd, kind in FIELDS if c == command
             for value in wrong_values(fd, kind)]
    assert len(cases) > 20                          # some 500 over all commands
    for flag, value in cases:
        with pytest.raises(UserError) as e:
            vqldm.parse_command([command, f"{flag}={value}"])
        said = str(e.value).replace(r"\x00", "\0")
        assert flag in said and value in said

def test_limits_and_defaults_are_allowed():
    for _, cls, fd, kind in FIELDS:
        m, many = fd.metadata, typing.get_origin(kind) is tuple
        assert vqldm.check_values(cls, {fd.name: fd.default}) == {fd.name: fd.default}
        for value in m["choices"] or [v for v in (m["lo"], m["hi"]) if v is not None]:
            typed, want = ([str(value)], (value,)) if many else (str(value), value)
            assert vqldm.check_values(cls, {fd.name: typed}) == {fd.name: want}
    assert vqldm.check_values(vqldm.VQConfig, {"out": "~/x"}) == {"out": os.path.expanduser("~/x")}

@pytest.mark.parametrize("command", vqldm.COMMANDS)
def test_help_shows_every_flag_with_its_meaning_and_default(command, capsys):
    with pytest.raises(SystemExit):
        vqldm.parse_command([command, "--help"])
    shown = capsys.readouterr().out
    for fd in (fd for c, _, fd, _ in FIELDS if c == command):
        text, default = fd.metadata["help"], fd.default
        default = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert len(text) > 8 and re.search(rf"^ +{vqldm.flag(fd.name)}\b", shown, re.M)
        assert f"{text} [{default}]\n" in shown or default == "" and f"{text}\n" in shown

@pytest.mark.parametrize("words, told", [
    ("", "COMMAND"), ("train", "train"), ("train-vq --epoch 3", "mean --epochs"),
    ("train-vq --batchsize=4", "mean --batch-size"), ("train-ldm --xyzzy 1", "--xyzzy"),
    ("sample --seed", "--seed"), ("sample runs/ldm", "runs/ldm"), ("train-vq --widths", "--widths"),
    ("train-vq --size 30", "--size 30"), ("train-vq --size 8 --widths 8 8 8", "--size 8"),
    ("train-vq --heads 3", "--heads 3"), ("train-ldm --heads 3", "--heads 3"),
    ("train-vq --d-widths 8 8 8 8 8 8 8", "--d-widths"),
    ("train-vq --resume --overwrite", "--overwrite"), ("sample --eta 0.5", "--eta 0.5"),
    ("evaluate --sampler ddpm --eta 1", "--eta 1: belongs to --sampler ddim")])
def test_mistakes_and_impossible_combinations_are_named(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        _, cls, typed = vqldm.parse_command(words.split())
        vqldm.settings(cls, typed)

@pytest.mark.parametrize("words", ["train-vq --size 30", "sample --n 0", "dream", "--help",
                                   "demo --help"])
def test_help_and_mistakes_are_answered_before_torch_is_imported(tmp_path, words):
    """In a process where importing torch or numpy would fail: one line, and nothing is written."""
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('too early')")
    cwd = fill(tmp_path / "cwd", [])
    done = run_python(HERE / "vqldm.py", *words.split(), cwd=cwd, PYTHONPATH=str(tmp_path))
    if "--help" in words:
        assert done.returncode == 0 and not done.stderr and len(done.stdout) > 500
    else:
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith("vqldm: ") and done.stderr.count("\n") == 1
    assert not list(cwd.iterdir())

# ------------------------------------------------------------------------------------------------
# E. Words
# ------------------------------------------------------------------------------------------------

HEAD, BODY = (HERE / "vqldm.py").read_text(encoding="utf8").split('"""', 2)[1:]

def test_equations_of_the_head_are_those_in_the_code():
    head = [int(n) for n in re.findall(r"(?:^  | {8})\((\d+)\) ", HEAD, re.M)]
    comments = [line.split("#", 1)[1] for line in BODY.splitlines() if "#" in line]
    assert head == list(range(1, 17))
    assert {int(n) for c in comments for n in re.findall(r"\((\d+)\)", c)} == set(head)

def test_contents_of_the_head_are_the_banners():
    contents = HEAD.split("\nContents", 1)[1].split("\nRun it")[0]
    listed = {int(n): name for n, name in re.findall(r"(\d+)\. ((?:[^\s.]| (?! ))+)", contents)}
    banners = re.findall(r"^# -+\n# (\d+)\. (.+)\n# -+$", BODY, re.M)
    assert [(int(n), name) for n, name in banners] == sorted(listed.items()) and len(banners) == 14

def test_every_command_in_the_readme_can_be_typed():
    if not (HERE / "README.md").exists():
        pytest.skip("no README.md yet")
    text = (HERE / "README.md").read_text(encoding="utf8").replace("\\\n", " ")
    commands = re.findall(r"(?:python3?|torchrun [^\n`]*?) +vqldm\.py +([^\n`#|;&>]+)", text)
    assert len(commands) >= 3
    for words in map(shlex.split, commands):
        if "--help" not in words:
            _, cls, typed = vqldm.parse_command(words)
            vqldm.settings(cls, typed)

def code_cells():
    cells = json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]
    return [dict(c, code="".join(c["source"])) for c in cells if c["cell_type"] == "code"]

def test_notebook_leaves_the_code_in_the_file():
    """It ran without errors, top to bottom; no cell is long, none defines a class."""
    cells = code_cells()
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    assert any("import vqldm" in c["code"] for c in cells)
    for c in cells:
        assert not any(o["output_type"] == "error" for o in c["outputs"])
        assert c["code"].count("\n") < 25 and not re.search(r"^\s*class ", c["code"], re.M)

@pytest.fixture(scope="session", autouse=True)
def notebook(request, tmp_path_factory):
    """The notebook in its short form, in a process that runs beside all other tests, which leave
    one of two cores idle: it takes a fifth of their time. -> (the process, where it writes)."""
    if not any("notebook_runs" in item.name for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("notebook")
    code = "\n".join(c["code"] for c in code_cells())
    (folder / "tutorial.py").write_text(re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M),
                                        encoding="utf8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VQLDM_FAST": "1", "MPLBACKEND": "Agg",
           "PYTHONPATH": str(HERE)}
    with open(folder / "said.txt", "w") as said:
        process = subprocess.Popen([sys.executable, "tutorial.py"], cwd=folder, env=env,
                                   stdout=said, stderr=said)
    yield process, folder / "said.txt"
    process.kill()

def test_notebook_runs_in_its_short_form(notebook):
    process, said = notebook
    assert process.wait() == 0, said.read_text(encoding="utf8")[-2000:]
