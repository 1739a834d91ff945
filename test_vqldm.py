# SPDX-License-Identifier: MIT
"""What vqldm.py promises, as tests. Each name, with its docstring, is the sentence that it proves.

    python -m pytest test_vqldm.py              all of it: about two minutes on one core, no network
    python -m pytest test_vqldm.py -k oracle    one promise
    VQLDM_LONG=1 python -m pytest test_vqldm.py -k killed       twenty kills instead of three

A. Laws: the mathematics, against closed forms     B. Data: good and bad images, epochs
C. Commands: train, stop, resume, sample           D. Command line: flags, mistakes
E. Words: head, README, notebook say what the code does
The oracle tests are the strongest: where the data is a known mixture of Gaussians, the best
possible network is a formula. With it in place of the UNet only the sampler's own error is left.
"""
import ast
import contextlib
import csv
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import types
import typing
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
HERE = Path(vqldm.__file__).parent
LONG = bool(os.environ.get("VQLDM_LONG"))

def randn(*shape, key=0):
    """Normal numbers that are the same in each run, whatever ran before."""
    return torch.randn(shape, generator=rng("test", key))

def grads(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)

@pytest.fixture(autouse=True)
def leave_no_trace():
    """A run that was stopped half way may leave its signal handlers behind."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

# ------------------------------------------------------------------------------------------------
# A. Laws: codebook
# ------------------------------------------------------------------------------------------------

def codebook(K=32, d=4):
    book = Codebook(K, d)
    book.embedding.weight.data = randn(K, d, key="codes")
    return book, randn(2, d, 6, 6, key="z").requires_grad_()

def flat(z):                    # (B,d,h,w) -> (B·h·w,d)
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)

def excess(k, z, book):
    """Squared distance of each z to the code it got, above that to its nearest one; in float64."""
    d = (flat(z.double())[:, None] - book.embedding.weight.detach().double()).square().sum(2)
    return d.gather(1, k.flatten()[:, None])[:, 0] - d.amin(1)

def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_z():
    book, z = codebook()
    out, k, *_ = book(z)
    assert torch.allclose(out, book.embedding.weight[k].permute(0, 3, 1, 2), atol=1e-6)
    out.backward(wanted := randn(*out.shape, key="wanted"))
    assert torch.equal(z.grad, wanted) and book.embedding.weight.grad is None

def test_codebook_loss_moves_only_the_codes():
    """‖sg[z] - e_k‖²: each code is pulled to the vectors that it won, z is not."""
    book, z = codebook()
    _, k, loss, _ = book(z)
    loss.backward()
    e, k = book.embedding.weight, k.flatten()
    pull = 2 * (e.detach()[k] - flat(z)) / z.numel()
    want = torch.zeros_like(e).index_add(0, k, pull)
    assert z.grad is None and torch.allclose(e.grad, want, atol=1e-7) and e.grad.any()

def test_commitment_loss_moves_only_z():
    book, z = codebook()
    out, _, codebook_loss, loss = book(z)
    loss.backward()
    assert book.embedding.weight.grad is None
    assert torch.allclose(z.grad, 2 * (z - out).detach() / z.numel(), atol=1e-7)
    assert torch.allclose(loss, codebook_loss)      # one distance, two halves

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_code_is_that_of_a_float64_search(dtype):
    """Also for bf16 latents under autocast, where distances in bf16 choose 5-15 % wrongly."""
    book = Codebook(512, 4)
    book.embedding.weight.data, z = randn(512, 4, key=1), randn(4, 4, 16, 16, key=2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        k, inside = book.nearest(z), book(z)[1]
    assert torch.equal(k, inside) and not k.is_floating_point()
    assert excess(k, z, book).max() < 1e-5

def test_codes_that_start_from_encoder_outputs_are_nearly_all_used():
    """Where z has mean 1 and std .3, the usual start around the origin leaves most codes unused."""
    K, z = 256, 1 + 0.3 * randn(16, 4, 16, 16)
    book, everything = Codebook(K, 4), torch.ones(K, dtype=torch.bool)
    nn.init.uniform_(book.embedding.weight, -1 / K, 1 / K)
    assert len(book.nearest(z).unique()) < 0.2 * K
    book.revive(z, everything, rng(0))
    assert len(book.nearest(1 + 0.3 * randn(16, 4, 16, 16, key=1)).unique()) > 0.95 * K

def test_revive_moves_only_the_dead_codes_and_only_onto_encoder_outputs():
    book, z = codebook()
    before, dead = book.embedding.weight.detach().clone(), torch.arange(32) % 3 == 0
    book.count(book.nearest(z))
    assert book.usage.sum() == 2 * 6 * 6 and torch.equal(book.usage > 0, torch.isin(
        torch.arange(32), book.nearest(z)))
    book.revive(100 + z, dead, rng(0))
    after = book.embedding.weight.detach()
    assert torch.equal(after[~dead], before[~dead]) and not book.usage.any()
    assert torch.cdist(after[dead], flat(100 + z)).amin(1).max() < 0.05 * flat(z).std(0).norm()
    assert len(after[dead].unique(dim=0)) == dead.sum()         # no two in the same place

def test_settle_shortens_outliers_and_keeps_every_nearest_code():
    book, _ = codebook(64)
    z = randn(8, 4, 8, 8) / randn(8, 1, 8, 8, key=1).abs() ** 0.7       # heavy tails
    settled, e = book.settle(z), book.embedding.weight.detach()
    distances = torch.cdist(e, e) + torch.eye(64) * 1e9
    spacing = distances.amin(1).median()
    code = book.lookup(book.nearest(z)).detach()
    away = (z - code).norm(dim=1, keepdim=True)
    assert excess(book.nearest(z), settled, book).max() < 1e-4
    want = code + (z - code) / away * away.clamp(max=spacing)       # same direction, shorter
    assert away.max() > 5 * spacing and torch.allclose(settled, want, rtol=1e-3, atol=1e-5)

# ------------------------------------------------------------------------------------------------
# A. Laws: blocks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("c", range(1, 71))
def test_norm_works_for_every_width_and_treats_each_image_alone(c):
    norm, x = vqldm.Norm(c), 5 + 3 * randn(3, c, 6, 6)
    y = norm(x)
    assert torch.allclose(y[:1], norm(x[:1]), atol=1e-5)
    groups = y.unflatten(1, (norm.num_groups, -1)).flatten(2)
    assert groups.mean(2).abs().max() < 1e-4
    assert (groups.var(2, correction=0) - 1).abs().max() < 1e-3
    assert c // norm.num_groups >= min(4, c)

def test_residual_branches_start_as_nothing():
    """At the start a ResBlock is its shortcut, an AttentionBlock the identity, the UNet's answer 0,
    and so the first loss is about 1: it 'predicts nothing'."""
    x, emb = randn(2, 8, 4, 4), randn(2, 16)
    block, wider = vqldm.ResBlock(8, 8, 16), vqldm.ResBlock(8, 12)
    assert torch.equal(block(x, emb), x) and torch.equal(wider(x), wider.shortcut(x))
    assert torch.equal(vqldm.AttentionBlock(8, 2)(x), x)
    net, z0, t = vqldm.UNet(4, (8, 12), 1), randn(512, 4, 4, 4), torch.arange(512) * 1000 // 512
    loss = Diffusion(1000).loss(net, z0, t, randn(*z0.shape, key=1)).mean().detach()
    assert abs(loss - 1) < 5 * math.sqrt(2 / z0.numel())    # 5 standard errors of a mean of n²

NETS = {"VQGAN": (lambda: vqldm.VQGAN((6, 10), 4, 8, 2), lambda net: net(randn(2, 3, 16, 16))),
        "PatchDiscriminator": (lambda: vqldm.PatchDiscriminator((6, 10)),
                               lambda net: (net(randn(2, 3, 16, 16)),)),
        "UNet": (lambda: vqldm.UNet(4, (6, 10), 2, 3),
                 lambda net: (net(randn(3, 4, 8, 8), torch.tensor([1, 50, 99]), torch.arange(3)),))}

@pytest.mark.parametrize("name", NETS)
def test_every_parameter_gets_a_gradient(name):
    """Not at the first step, where zeroed layers let nothing through, but soon: a layer that is
    built and never called would show."""
    torch.manual_seed(0)
    make, call = NETS[name]
    net = make()
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):
        outputs = [y for y in call(net) if y.is_floating_point()]
        opt.zero_grad()
        sum((y - 0.3).square().mean() for y in outputs).backward()
        opt.step()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

def test_unet_listens_to_time_and_class_after_a_step():
    torch.manual_seed(0)
    net, z = vqldm.UNet(4, (8, 12), 1, 3), randn(3, 4, 8, 8)
    t, c = torch.tensor([5, 50, 99]), torch.arange(3)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(2):
        opt.zero_grad()
        (net(z, t, c) - randn(3, 4, 8, 8, key=1)).square().mean().backward()
        opt.step()
    out = net(z, t, c)
    for other in (net(z, t + 1, c), net(z, t, (c + 1) % 3), net(z, t)):
        assert (out - other).flatten(1).abs().amax(1).min() > 1e-5
    assert torch.equal(net(z, t), net(z, t, torch.full((3,), 3)))       # class n_classes: not told

def test_attention_does_not_ask_for_its_weights(monkeypatch):
    """Those are B·heads·N² numbers. What it computes is attention: permuted in, permuted out."""
    asked, forward = [], nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, *a, **kw: (
        asked.append(kw.get("need_weights", True)), forward(self, *a, **kw))[1])
    block, x = vqldm.AttentionBlock(8, 2), randn(2, 8, 4, 4)
    order = torch.randperm(16, generator=rng(1))
    nn.init.normal_(block.attention.out_proj.weight)
    y, shuffled = block(x).flatten(2), block(x.flatten(2)[..., order].view_as(x)).flatten(2)
    assert asked == [False, False] and torch.allclose(y[..., order], shuffled, atol=1e-5)

def test_upsampling_paints_every_pixel_equally_often():
    """From a constant image, with equal weights, comes a constant: no checkerboard of period 2."""
    up = vqldm.UpBlock(3, 3).up
    nn.init.ones_(up.weight), nn.init.zeros_(up.bias)
    inside = up(torch.ones(1, 3, 8, 8))[..., 2:-2, 2:-2]
    assert up(torch.ones(1, 3, 8, 8)).shape[-1] == 16 and inside.std() < 1e-6 < inside.mean()

# ------------------------------------------------------------------------------------------------
# A. Laws: the losses of stage 1
# ------------------------------------------------------------------------------------------------

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
    before, last = disc(x), [m for m in disc.modules() if isinstance(m, nn.Conv2d)][-1]
    with torch.no_grad():
        for p in last.parameters():
            p *= 1000
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
    assert lam == 1e4 and lam.shape == () and lam.dtype == torch.float32
    assert not lam.requires_grad
    assert not vqldm.adaptive_weight(rec(), gan(), x_hat, last)[0].requires_grad

@pytest.fixture()
def random_lpips(monkeypatch):
    """LPIPS with a random trunk: its weights are not needed to see how it is used."""
    import lpips
    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))

def test_lpips_is_in_no_network_and_stays_frozen_in_eval_mode(random_lpips):
    torch.manual_seed(0)
    perceptual = vqldm.Perceptual("squeeze", torch.device("cpu"))
    owner = vqldm.VQGAN((8,), 4, 8, 1)
    owner.perceptual = perceptual
    owner.train()                       # what would switch its dropout on
    assert not isinstance(perceptual, nn.Module)
    assert not any("perceptual" in k for k in owner.state_dict())
    modules = list(perceptual.net.modules())
    assert not any(m.training for m in modules) and any(isinstance(m, nn.Dropout) for m in modules)
    assert not any(p.requires_grad for p in perceptual.net.parameters())
    x, x_hat = randn(1, 3, 64, 64).clamp(-1, 1), randn(1, 3, 64, 64, key=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):       # in fp32, whatever is around it
        inside = perceptual(x, x_hat)
    assert inside.dtype == torch.float32 and torch.equal(inside, perceptual(x, x_hat))
    assert perceptual(x, x) == 0 and grads(inside, (x_hat,))[0].any()

def test_damaged_lpips_is_noticed_and_missing_lpips_is_said_loudly(monkeypatch, capsys):
    import lpips

    def missing(**_):
        raise OSError("no network")
    monkeypatch.setattr(lpips, "LPIPS", missing)
    assert vqldm.load_perceptual("auto", torch.device("cpu")) == (None, "off")
    assert "WITHOUT" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="--lpips squeeze"):
        vqldm.load_perceptual("squeeze", torch.device("cpu"))
    monkeypatch.setattr(lpips, "LPIPS", lambda **_: type("Blind", (nn.Module,), dict(
        forward=lambda self, x, y: x.new_zeros(1)))())
    with pytest.raises(UserError, match="damaged"):
        vqldm.load_perceptual("auto", torch.device("cpu"))
    assert vqldm.load_perceptual("off", None) == (None, "off")

# ------------------------------------------------------------------------------------------------
# A. Laws: the steps of stage 1, watched in a real run
# ------------------------------------------------------------------------------------------------
# A tiny train-vq runs once. At each update, before the weights change, its gradients are compared
# with those of the paper's formula, worked out anew in one plain backward.

SMALL = "--device cpu --precision fp32 --batch-size 8 --warmup 2".split()
SMALL_VQ = ["train-vq", *SMALL, *("--size 16 --n-images 48 --widths 8 16 --codes 16 "
                                  "--d-widths 8 16 --lpips off").split()]

def cli(*words):
    """The command, run in this process -> exit status."""
    try:
        return vqldm.main([str(w) for w in words])
    except SystemExit as e:
        code = e.code
    gc.collect()                # a run that ended half way holds its lock until it is collected
    return code

def no_pictures(patch):
    for name in ("draw_rows", "draw_curves", "draw_usage", "draw_trajectory", "draw_nearest"):
        patch.setattr(vqldm, name, lambda *a, **kw: None)

def perceived(x, x_hat):        # stands for LPIPS: some fixed distance with a gradient
    return F.avg_pool2d(x - x_hat, 4).abs().mean()

@pytest.fixture(scope="module")
def watched_vq(tmp_path_factory):
    """-> a fact for each generator step and each critic step, and what was seen at the start."""
    seen, facts = types.SimpleNamespace(calls=[], disc=None, kept=[]), []
    folder = tmp_path_factory.mktemp("watched")
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
            far = torch.cdist(self.embedding.weight.detach(), flat(z)).amin(1).max() / z.std()
            seen.start = bool(dead.all()), float(far)

    def generator_gradients(run, params):
        x_hat, _, _, codebook_loss, commit_loss = forward(seen.net, seen.x)
        l_rec = F.mse_loss(x_hat, seen.x) + 1.3 * perceived(seen.x, x_hat)
        loss = l_rec + 0.7 * codebook_loss + 0.3 * commit_loss
        of_gan = run.step + 1 - round(run.cfg.gan_start * run.n / 8)        # first GAN step: 1
        if of_gan > 0:
            l_gan, last = -critic(seen.disc, x_hat).mean(), (seen.net.decoder.last.weight,)
            lam = grads(l_rec, last)[0].norm() / (grads(l_gan, last)[0].norm() + 1e-4)
            ramp = min(1, of_gan / round(run.cfg.gan_ramp * run.n / 8))
            loss = loss + 0.8 * ramp * lam.detach() * l_gan
        return grads(loss, params), of_gan > 0

    def watch_update(self, optimizer, params, losses):
        fact = dict(step=self.step, calls=seen.calls, gan=None)
        seen.calls, mine = [], params[0] is next(seen.net.parameters())
        if mine:
            want, fact["gan"] = generator_gradients(self, params)
        else:
            real, fake = critic(seen.disc, seen.x), critic(seen.disc, seen.out[0].detach())
            want = grads((F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2, params)
        error = max((p.grad - w).norm() / (w.norm() + 1e-6) for p, w in zip(params, want))
        other = seen.disc if mine else seen.net     # its gradients must be as its update left them
        leak = other is not None and not all(
            torch.equal(p.grad, g) for p, g in zip(other.parameters(), seen.kept, strict=True))
        done = update(self, optimizer, params, losses)
        seen.kept = [p.grad.clone() for p in params]
        facts.append(dict(fact, mine=mine, error=float(error), leak=leak,
                          lr=optimizer.param_groups[0]["lr"],
                          norm=float(torch.cat([g.flatten() for g in seen.kept]).norm())))
        return done

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
    assert len(steps) == 17 and max(f["error"] for f in steps) < 1e-3
    assert [f["gan"] for f in steps] == [False] * 6 + [True] * 11
    assert [bool(f["calls"]) for f in steps] == [f["gan"] for f in steps]

def test_critic_trains_alone_first_and_on_a_detached_fake(watched_vq):
    """Its gradient is that of hinge on the images as they were made, and reaches no generator."""
    steps = [f for f in watched_vq.facts if not f["mine"]]
    assert [f["step"] for f in steps] == list(range(4, 17))         # the GAN starts at 6
    assert max(f["error"] for f in steps) < 1e-3 and not any(f["leak"] for f in steps)
    assert all(f["calls"] == [(False, True)] for f in steps)        # (input, D) require gradients

def test_generator_step_leaves_no_gradient_in_the_critic(watched_vq):
    steps = [f for f in watched_vq.facts if f["mine"] and f["gan"]]
    assert all(f["calls"] == [(True, False)] and not f["leak"] for f in steps)

def test_training_starts_its_codes_from_encoder_outputs(watched_vq):
    all_of_them, distance = watched_vq.start
    assert all_of_them and distance < 0.2

def test_learning_rate_is_absolute_and_gradients_are_clipped(watched_vq):
    """What was typed, after the warm-up: neither times the batch nor over it."""
    for f in watched_vq.facts:
        lr = 0.002 if f["mine"] else 0.003
        assert f["lr"] == pytest.approx(lr * min(1, (f["step"] + 1) / 3))
        assert f["norm"] < 1.001

# ------------------------------------------------------------------------------------------------
# A. Laws: diffusion
# ------------------------------------------------------------------------------------------------

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

def test_a_schedule_that_cannot_work_is_refused():
    for args in ((1, "linear"), (1000, "quadratic")):
        with pytest.raises(ValueError):
            Diffusion(*args)

@pytest.mark.parametrize("target", ["v", "eps"])
def test_noise_is_added_in_closed_form_and_predict_takes_it_away(target):
    """z_t = √ᾱ z0 + √(1-ᾱ) eps, with ᾱ = 1 before all noise; from it and the right answer of a
    network comes (z0, eps), and a wrong z0 of ±5 is not clipped."""
    d, t = Diffusion(1000, target=target), torch.tensor([0, 7, 300, 700])
    z0, eps = 5 * randn(4, 4, 3, 3), randn(4, 4, 3, 3, key=1)
    a = torch.tensor([math.prod(1 - (1e-4 + 0.0199 * s / 999) for s in range(i + 1)) for i in t])
    a = a.view(4, 1, 1, 1)
    z_t = d.add_noise(z0, t, eps)
    assert torch.allclose(z_t, a.sqrt() * z0 + (1 - a).sqrt() * eps, atol=1e-4)
    assert torch.equal(d.add_noise(z0, torch.full((4,), -1), eps), z0)
    right = eps if target == "eps" else a.sqrt() * eps - (1 - a).sqrt() * z0
    for got, want in zip(d.predict(right, z_t, t), (z0, eps)):
        assert torch.allclose(got, want, atol=1e-3)
    assert z0.abs().max() > 10

@pytest.mark.parametrize("target", ["v", "eps"])
def test_loss_is_0_for_the_right_answer_and_1_for_none(target):
    """On standardised latents, at every noise level: 1.0 on the screen means 'predicts nothing'."""
    d, t = Diffusion(1000, target=target), torch.arange(1000)
    z0, eps = randn(1000, 4, 4, 4), randn(1000, 4, 4, 4, key=1)

    def knows(z_t, t, label):
        a = d.alpha_bar[t].view(-1, 1, 1, 1)
        assert torch.allclose(z_t, a.sqrt() * z0 + (1 - a).sqrt() * eps, atol=1e-5)
        return eps if target == "eps" else a.sqrt() * eps - (1 - a).sqrt() * z0
    assert d.loss(knows, z0, t, eps).max() < 1e-10
    nothing = d.loss(lambda z_t, t, label: torch.zeros_like(z_t), z0, t, eps)
    assert nothing.shape == (1000,) and abs(nothing.mean() - 1) < 5 * math.sqrt(2 / z0.numel())

def test_pairs_are_exactly_S_steps_for_every_S():
    """From T-1, or the level that one starts from, strictly down to -1."""
    d = Diffusion(1000)
    for levels, S in [(1000, S) for S in range(1, 1001)] + [(600, S) for S in (1, 7, 599, 600)]:
        t, prev = zip(*d.pairs(S, levels))
        assert len(t) == S and t[0] == levels - 1 and prev == (*t[1:], -1)
        assert all(a > b for a, b in zip(t, prev))
    assert d.pairs(50) == d.pairs(50, 1000)

SAMPLERS = [("ddpm", 1.0), ("ddim", 1.0), ("ddim", 0.0)]

@pytest.mark.parametrize("sampler, eta", SAMPLERS)
@pytest.mark.parametrize("S", [1, 2, 7, 50])
def test_last_step_is_free_of_noise_and_returns_the_clean_guess(S, sampler, eta):
    """If the data is one point, at 5, every sampler arrives there in any number of steps. Noise is
    drawn S-1 times: not after the last step, nor at all on DDIM's fixed path."""
    d, point, drawn = Diffusion(1000, target="eps"), torch.full((3, 2, 2, 2), 5.0), []

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
WEIGHT = torch.tensor([0.5, 0.3, 0.2])
CENTRE = torch.tensor([[-1.0, 0.4], [1.0, 0.7], [0.6, -1.6]])
SPREAD = torch.tensor([0.25, 0.3, 0.35])
MEAN = WEIGHT @ CENTRE
COV = (CENTRE.T * WEIGHT) @ CENTRE - MEAN[:, None] * MEAN + (WEIGHT @ SPREAD ** 2) * torch.eye(2)

def clouds(x, a):
    """Bayes, for x (n,2) = √a z0 + √(1-a) eps: log p(x and cloud) (n,3), and E[eps | x] (n,2)."""
    var, away = a * SPREAD ** 2 + 1 - a, x[:, None] - a.sqrt() * CENTRE
    log_p = WEIGHT.log() - var.log() - away.square().sum(2) / var / 2
    each = (1 - a).sqrt() * away / var[:, None]
    return log_p, (log_p.softmax(1)[:, :, None] * each).sum(1)

@pytest.mark.parametrize("S", [7, 50, 250, 1000])
@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_oracle_every_sampler_draws_the_data_from_the_perfect_network(sampler, eta, S):
    """With E[eps | z_t] for a network the samples have the data's mean, covariance and share of
    each cloud, for both targets. Two errors remain. Chance: 4.5 standard errors of n samples (the
    coordinates have a std below 1, their products below 1.5, a share below 1/2). And finite steps:
    the samplers are of first order, so it falls as 1/S; 3/S bounds it for this data."""
    n, draw = 4000, {}
    for target in ("v", "eps"):
        d, fresh = Diffusion(1000, target=target), (randn(n, 2, 1, 1, key=i) for i in range(S + 1))

        def net(z, t, d=d):
            a = d.alpha_bar[t[0]]
            eps = clouds(z.flatten(1), a)[1].view_as(z)
            return eps if d.target == "eps" else (eps - (1 - a).sqrt() * z) / a.sqrt()     # (12)
        *_, (z, _) = d.sample(net, next(fresh), S, sampler, eta, lambda fresh=fresh: next(fresh))
        draw[target] = z.flatten(1)
    x, chance = draw["v"], 4.5 / math.sqrt(n)
    assert (x - draw["eps"]).abs().max() < 0.02         # one formula in two costumes
    share = torch.bincount(clouds(x, torch.tensor(1.0))[0].argmax(1), minlength=3) / n
    assert (x.mean(0) - MEAN).abs().max() < chance + 1 / S
    assert (x.T.cov() - COV).abs().max() < 1.5 * chance + 3 / S
    assert (share - WEIGHT).abs().max() < chance / 2 + 1 / S

def test_guidance_extrapolates_from_no_class_to_class():
    """w = 1 is exactly the conditional network, w = 0 exactly the one that is not told; 2 as far
    beyond."""
    torch.manual_seed(0)
    net, z = vqldm.UNet(4, (8,), 1, 3), randn(3, 4, 4, 4)
    t, c = torch.tensor([1, 5, 9]), torch.arange(3)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    plain, told = net(z, t), net(z, t, c)
    assert (plain - told).abs().max() > 0.01
    assert torch.equal(vqldm.guided(net, c, 1)(z, t), told)
    assert torch.equal(vqldm.guided(net, c, 0)(z, t), plain)
    assert torch.equal(vqldm.guided(net, None, 5)(z, t), plain)
    for w in (2, 0.5, 7):
        want = plain + w * (told - plain)
        assert torch.allclose(vqldm.guided(net, c, w)(z, t), want, atol=1e-4)

# ------------------------------------------------------------------------------------------------
# A. Laws: the steps of stage 2, watched in a real run
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def watched_ldm(watched_vq):
    """Twelve whole epochs with T = 10 -> what each step was given, and its checkpoint."""
    steps, weights, loss, average = [], [], Diffusion.loss, vqldm.update_ema

    def watch_loss(self, net, z0, t, eps, label=None):
        if torch.is_grad_enabled():         # training, not measuring
            steps.append(dict(z0=z0, t=t, eps=eps, label=label))
            weights.extend([net.first.weight.detach().clone()] * (not weights))
        return loss(self, net, z0, t, eps, label)

    def watch_average(ema, net, step, decay):
        weights.append(net.first.weight.detach().clone())
        average(ema, net, step, decay)
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.chdir(watched_vq.folder)
        patch.setattr(Diffusion, "loss", watch_loss)
        patch.setattr(vqldm, "update_ema", watch_average)
        assert cli("train-ldm", *SMALL, *"--T 10 --unet-widths 8 --epochs 12 --ema .8 "
                   "--label-drop .3 --lr .01".split()) == 0
        state = vqldm.load_checkpoint("runs/ldm", ["ldm"], "--ckpt")
        images = vqldm.load_images("synthetic", 16, 48, 0.1, vqldm.VQConfig(
            cache=str(watched_vq.folder / "runs/cache")))
    return types.SimpleNamespace(**{k: torch.cat([s[k] for s in steps]) for k in steps[0]},
                                 weights=weights, state=state, images=images)

def test_training_draws_every_t_alike_and_hides_labels(watched_ldm):
    """t covers 0…T-1, so that no step is sampled that was never trained. 44 · 12 = 528 draws."""
    t, hidden = torch.bincount(watched_ldm.t), (watched_ldm.label == 4).float().mean()
    assert len(t) == 10 and (t - 52.8).abs().max() < 4.5 * math.sqrt(528 * 0.1 * 0.9)
    assert abs(hidden - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 528) and watched_ldm.label.max() == 4
    assert abs(watched_ldm.eps.std() - 1) < 0.02 and abs(watched_ldm.eps.mean()) < 0.02

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
    make = vqldm.Generator(watched_ldm.state, torch.device("cpu"), None, "")
    x = watched_ldm.images.batch(range(16))
    own = vqldm.to_bytes(make.vqgan(x)[0])
    assert (make.decode(make.encode(x)).int() - own.int()).abs().max() <= 1
    assert own.float().std() > 5

def test_ema_is_the_closed_form_with_warm_up_and_is_what_samples(watched_ldm):
    """Step i keeps d_i = min(d, (1+i)/(10+i)) of it. With d = 0.9999, a thousand steps leave of the
    first weights ∏ d_i < 1e-6, not 0.9."""
    want, *rest = watched_ldm.weights
    for i, w in enumerate(rest):
        d = min(0.8, (1 + i) / (10 + i))
        want = d * want + (1 - d) * w
    state = watched_ldm.state
    assert len(rest) == 66 and torch.allclose(state["ema"]["first.weight"], want, atol=1e-5)
    make = vqldm.Generator(state, torch.device("cpu"), None, "")
    assert torch.equal(make.net.first.weight, state["ema"]["first.weight"])
    assert not torch.equal(make.net.first.weight, state["model"]["first.weight"])
    one, none = (nn.Linear(1, 1, bias=False).requires_grad_(False) for _ in range(2))
    one.weight.fill_(1), none.weight.fill_(0)
    for i in range(1000):
        vqldm.update_ema(one, none, i, 0.9999)
    left = math.prod((1 + i) / (10 + i) for i in range(1000))
    assert left < 1e-6 and float(one.weight) == pytest.approx(left, rel=1e-3)
