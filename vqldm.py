# SPDX-License-Identifier: MIT
"""vqldm: VQGAN + latent diffusion in one file, from pixels to new images.

Stage 1, the VQGAN, learns to write an image as a small grid of code numbers and to read it back.
Stage 2, latent diffusion, learns to turn noise into new grids, which stage 1 turns into images.
Grids are small, so all of this fits on a laptop. The images are skin lesions seen through a
dermatoscope, either drawn by the program or real (ISIC), or any other folder of images.

  x ───Enc───► z ───nearest code───► z_q ───Dec───► x_hat       stage 1: VQGAN        (train-vq)
  (B,3,H,W)    (B,d,h,w)  │          (B,d,h,w)      (B,3,H,W)
                          └► k (B,h,w) in 0…K-1                 h = H/f, w = W/f, f = 2^m
  k → z_q → z0 = (z_q-mean)/std ──noise──► z_t ──UNet──► v      stage 2: diffusion    (train-ldm)
  noise ──UNet, S times──► z0 ──·std+mean──► nearest code ──Dec──► image              (sample)

Letters   B batch · C channels · H W pixels · h w latent grid · d length of a code · K codes
          N = h·w cells · m halvings · T noise levels · S sampling steps · E size of emb (t, class)
          x image in [-1,1] · z latent · z_q its code · k its number · z0 standardised z_q (DDPM's
          x_0) · z_t the same at noise level t in 0…T-1 · eps the noise ε · v a mix of ε and z0
          abar is ᾱ · lam is λ, it scales the GAN's loss · a hat: estimated · sg[] is .detach()
Papers    VQ van den Oord 2017 (arXiv 1711.00937) · VQGAN Esser 2021 (2012.09841) · DDPM Ho 2020
          (2006.11239) · DDIM Song 2021 (2010.02502) · LDM Rombach 2022 (2112.10752)
          v Salimans 2022 (2202.00512) · CFG (classifier-free guidance) Ho 2022 (2207.12598)
Contents  1. Settings                       7. Stage 1: training      For reference:
          2. Device, precision, seeds       8. Stage 2: diffusion     A. Drawn lesions  E. Measuring
          3. What both trainings share      9. Stage 2: the UNet      B. A folder of images
          4. Blocks                        10. Stage 2: training      C. Keeping a run  F. Muon
          5. Stage 1: the VQGAN            11. Sampling               D. Pictures       G. Commands
          6. Stage 1: the losses
Run it    python vqldm.py train-vq, then train-ldm, then sample. evaluate measures either stage.
          "trap" marks a frequent mistake, "ours" an idea that none of the named papers has.
"""
import argparse, csv, functools, glob, io, json, math, os, random, re, shlex, sys, time, warnings
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from inspect import getsource
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, default_int_handler, signal

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # torch reads it: CPU for what MPS lacks
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torchvision.io import write_png
from torchvision.utils import make_grid
from tqdm import tqdm
# ------------------------------------------------------------------------------------------------
# 1. Settings
# Every setting is one line below, with its name, type and default. The comment on the line is its
# --help. What you type beats --preset, and --preset beats the default. With --resume, the values of
# the checkpoint apply, and only the settings in MAY_CHANGE may differ from them.

class UserError(argparse.ArgumentTypeError):    # argparse catches it and puts the flag's name first
    """A mistake that only the user can mend, reported in one sentence with exit status 2."""
def demand(ok, text):
    if not ok:
        raise UserError(text)

# The type of a setting is the function that reads its value from the command line.
def whole(text):
    demand(int(text) >= 1, "must be 1 or more")
    return int(text)
def wholes(text):                       # "16,64" -> (16, 64)
    return tuple(map(whole, text.split(",")))
def amount(text):
    demand(0 <= float(text) < math.inf, "must be 0 or more")
    return float(text)
def choice(*words):                     # one of these words
    def read(text):
        demand(text in words, f"must be one of {', '.join(words)}")
        return text
    return read
def source(text):                       # a folder is recorded with its full path
    demand(text, "must be a folder, or 'synthetic'")
    return text if text == "synthetic" else os.path.realpath(os.path.expanduser(text))

@dataclass(frozen=True)
class Settings:
    """Settings of every command."""
    seed: int = 0                       # seeds everything random, except the held-out split
    device: str = "auto"                # auto, or a device of torch, such as cpu or cuda:1
    out: str = ""                       # empty: runs/vq, runs/ldm, runs/samples, or --ckpt's folder
    @property
    def folder(self):                   # evaluate uses this with --out only
        return Path(self.out or f"runs/{self.kind}").expanduser()

@dataclass(frozen=True)
class Training(Settings):
    """Settings of both trainings."""
    preset: str = "default"             # tiny is a quick test, report a course report's system
    upsample: choice("nearest", "transposed") = "nearest"   # nearest or transposed, to double grids
    lr: amount = 1e-3                   # learning rate of everything that has none of its own
    minutes: amount = 0.0               # if above 0, train for this long instead of --epochs

@dataclass(frozen=True)
class Sampling:
    """How images are made. sample and evaluate follow what train-ldm recorded, unless told."""
    sampler: choice("ddim", "ddpm") = "ddim"        # ddim, or ddpm, which needs many more steps
    steps: whole = 50                   # S, steps from noise to image, at most T
    guidance: amount = 2.2              # 1 is off. Weak networks need more. Too much costs variety

@dataclass(frozen=True)
class VQConfig(Training):
    """stage 1: train the VQGAN, image -> codes -> image"""
    kind = "vq"                         # no ": type", so it is no field and has no flag
    data: source = "synthetic"          # 'synthetic', or a folder of images. A subfolder is a class
    n_images: whole = 4096              # how many to draw if synthetic
    size: whole = 64                    # side of the square images, in pixels
    widths: wholes = (16, 64)           # channels of the m DownBlocks, such as 16,32,64; f = 2^m
    z_dim: whole = 3                    # d, the length of a code. 3 beat 2 and 4 (NOTES.md)
    codes: whole = 2048                 # K, the number of codes
    lpips: choice("auto", "off") = "auto"       # auto: use LPIPS if its weights can be loaded
    lpips_weight: amount = 0.1          # weight of LPIPS, a learned distance between images
    commit_weight: amount = 0.25        # weight of the commitment loss; the codebook loss has 1
    gan_weight: amount = 0.4            # weight of the GAN's loss, 0 for no GAN
    lam_max: amount = 0.004             # limit of lam, which balances the GAN in section 6
    gan_start: amount = 0.1             # fraction of the run after which the GAN joins
    muon_lr: amount = 0.02              # Muon's rate for the blocks' kernels, 0 for Adam at --lr
    codes_lr: amount = 0.02             # learning rate of the codes, which must keep up with z
    d_lr: amount = 4e-4                 # learning rate of the discriminator
    batch_size: whole = 8               # images in a step, over all processes
    epochs: whole = 3                   # passes over the training images
    @property
    def side(self):                     # h = w, the side of the latent grid
        return self.size // 2 ** len(self.widths)

@dataclass(frozen=True)
class LDMConfig(Sampling, Training):
    """stage 2: train the diffusion model on the VQGAN's codes"""
    kind = "ldm"
    vq: str = "runs/vq"                 # run folder or checkpoint of train-vq; its images are used
    unconditional: bool = False         # the UNet is not told the class of an image
    balance: bool = False               # draw every class equally often, however rare it is
    T: whole = 1000                     # noise levels
    schedule: choice("cosine", "linear") = "cosine"     # cosine or linear: how noise grows
    target: choice("v", "eps") = "v"    # v or eps: what the UNet predicts. eps goes with linear
    widths: wholes = (64, 128)          # channels of the UNet's DownBlocks
    ema: amount = 0.995                 # decay of the running mean of the weights
    batch_size: whole = 32              # latents in a step, over all processes
    epochs: whole = 36                  # passes over the training latents

@dataclass(frozen=True)
class SampleConfig(Sampling, Settings):
    """make new images with a trained stage 2"""
    kind = "samples"
    reads = ("ldm",)                    # the stages whose checkpoints it can use
    ckpt: str = "runs/ldm"              # run folder or checkpoint of train-ldm
    n: whole = 64                       # how many images, over all classes
    class_: str = ""                    # only this class. Empty means all, in turn

@dataclass(frozen=True)
class EvaluateConfig(Sampling, Settings):
    """measure a checkpoint of either stage on images that it was not trained on"""
    reads = "ldm", "vq"
    ckpt: str = "runs/ldm"              # run folder or checkpoint of either stage
    data: source = ""                   # folder of other images. Empty means unseen ones of --ckpt
    n: whole = 500                      # at most 2n unseen images, in two sets, and n samples
    images: str = ""                    # new folder for PNGs, for other tools. Empty means none

PRESETS = {"default": {},           # a preset is a list of flags, and typed flags beat it
    "tiny": {"train-vq": "--size 32 --n-images 200 --widths 16,32 --codes 64 --epochs 2",
             "train-ldm": "--T 200 --widths 32,64 --batch-size 16 --epochs 4"},
    "report": {"train-vq": "--upsample transposed --lpips-weight 1 --commit-weight 1 "
               "--gan-weight 1 --lam-max 1e4 --gan-start 0.267 --epochs 30 "
               "--lr 3e-4 --muon-lr 0 --codes-lr 3e-4 --d-lr 3e-4",
               "train-ldm": "--unconditional --target eps --schedule linear --upsample transposed "
               "--sampler ddpm --steps 1000 --guidance 1"}}
MAY_CHANGE = {"device", "out", "lpips", "epochs", "minutes", "sampler", "steps", "guidance"}
# ------------------------------------------------------------------------------------------------
# 2. Device, precision, seeds
# What do we compute on, how many processes are there, and where does randomness come from?

def pick_device(cfg):
    """-> device, and a context (autocast) in which matrix products run in bf16, where supported.
    bf16 is a 16-bit float with fp32's range and 2-3 decimal digits. It is often twice as fast."""
    name = cfg.device
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        one = torch.ones(1, device=name)
        one.item()                              # some devices exist but cannot compute
    except Exception:
        demand(cfg.device == "auto" and name != "cpu", "--device: cannot be used here, but cpu can")
        say("WARNING", name, "is listed but cannot be used")
        return pick_device(replace(cfg, device="cpu"))
    device = one.device                         # cuda -> cuda:0
    bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":                   # not where bf16 is only emulated, which is slower
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    say("device", device, "in bf16" if bf16 else "in fp32 (no bf16 units found)")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)

def rng(*key):
    """The random numbers that belong to a key, such as (seed, "turns", step). Randomness is looked
    up, never carried along. Step 700 draws the same numbers whether the run got there in one go or
    was killed and resumed, so a checkpoint needs no random state. Torch keeps 32 bits of a CPU
    generator's seed, so among 50,000 keys two may share numbers. That is harmless."""
    return torch.Generator().manual_seed(digest(key))
def digest(key):                        # anything printable -> 63 bits, the same in any process
    return random.Random(repr(key)).getrandbits(63)

# torchrun starts a training once for each GPU. There are world() processes, this one is rank(), and
# each takes an equal share of every batch. What they combine, and when:
#   in each step      the mean of all gradients before they are clipped, and of lam's two gradients
#                     the sum of wins, that is how often each code was chosen
#   between steps     the mean of the progress, so that all stop at the same step
#   every ten steps   the mean of the losses that are logged
#   every fifty       all take over the first process's restarted codes
# All else concerns a process's own share, or is computed alike from the same seeds.
def world():
    return dist.get_world_size() if dist.is_initialized() else 1
def rank():
    return dist.get_rank() if dist.is_initialized() else 0
def share(batch):                       # this process's rows of a batch
    return batch.chunk(world())[rank()]
def sum_over_processes(x):              # in place: x itself becomes the sum
    if world() > 1:
        dist.all_reduce(x)
    return x
def mean_over_processes(x):
    return sum_over_processes(x) / world()
def average_gradients(net):
    if world() > 1:                     # all in one message, since one for each tensor is slower
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        mean = mean_over_processes(parameters_to_vector(grads))
        vector_to_parameters(mean, grads)       # writes into the .grad tensors themselves

def say(*words):
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))
def bar(items, name, total=None):       # a progress bar, on a terminal only
    return tqdm(items, name, total, leave=False, disable=rank() or None)
# ------------------------------------------------------------------------------------------------
# 3. What both trainings share
# A set of images, the order in which they are shown, learning rates, a step of gradient descent.

class Images:
    """All images of a run, as squares of one size. Appendix B finds and reads them. labels holds
    the class number of each, train and val hold the row numbers of training and held-out images.
    seen holds the marks (checksums) of all images that this run or an earlier one trained on. These
    are never held out, however the folder has changed since."""
    def __init__(self, source, cfg, cache, seen=()):
        self.pixels, entries = prepare_images(source, cfg, cache)         # uint8 (n,3,H,W)
        self.names, kinds, draws, marks = zip(*entries)
        self.classes = sorted(set(kinds))
        self.labels = torch.tensor([self.classes.index(kind) for kind in kinds])
        self.marks = torch.tensor(marks)
        before = torch.as_tensor(seen, dtype=torch.int64)
        draw = torch.tensor(draws)
        held = draw % 10 == 0                       # draw ends in 0 for about a tenth (B)
        if not held.any():                          # too few images for that
            held = draw == draw.min()
        held &= ~torch.isin(self.marks, before)
        self.train = (~held).nonzero().flatten()
        val = held.nonzero().flatten()              # a folder is in order of class, so mix them
        self.val = val[torch.randperm(len(val), generator=rng("held out"))]
        self.seen = torch.cat([before, self.marks[self.train]]).unique()
        say("data", source, len(self.names), "images:", *self.classes)
        if 0 < len(before) < len(self.seen):
            say("WARNING", len(self.seen) - len(before), "of the training images are new")
    def rows(self, rows):               # row numbers (B,) -> uint8 (B,3,H,W)
        return self.pixels[rows]

def to_float(x):                        # uint8 0…255 -> [-1,1]. Only x_hat may go beyond
    return x.float() / 127.5 - 1
def to_bytes(x):                        # and back, on the CPU
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()

@functools.lru_cache(maxsize=2)         # a batch may straddle two epochs
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=rng(seed, "order", epoch))

def next_rows(n, step, batch_size, seed):
    """Row numbers (B,) of this step's batch. The images are reshuffled every epoch, and a step
    takes the next batch_size of that endless stream."""
    stream = range(step * batch_size, (step + 1) * batch_size)          # i // n is the epoch
    return torch.stack([shuffled(n, seed, i // n)[i % n] for i in stream])

def rate(step, progress):
    """Factor of all learning rates. It rises for 50 steps. In the last 60 % it falls to 0.01."""
    up = (step + 1) / 50
    down = (1 - progress) / 0.6
    return max(0.01, min(1, up, down))
def set_learning_rate(optimizer, factor):
    for group in optimizer.param_groups:
        initial = group.setdefault("initial_lr", group["lr"])     # noted at the first call
        group["lr"] = factor * initial

def descend(loss, net, *optimizers):
    """One step down. -> True, or False if a gradient is not finite, and then nothing has moved.
    trap: the generator's loss leaves gradients in D. Unless zeroed, they would push D(fake) up."""
    net.zero_grad()
    loss.backward()
    average_gradients(net)
    # Clipped, so that one outlier batch cannot dominate the optimisers' running averages.
    norm = clip_grad_norm_(net.parameters(), 1.0)
    if norm.isfinite():
        for optimizer in optimizers:
            optimizer.step()
    return bool(norm.isfinite())
# ------------------------------------------------------------------------------------------------
# 4. Blocks
# The VQGAN and the UNet are built from the same blocks. Two things differ. Each ResBlock of the
# UNet also receives the noise level and the class (emb), and each UpBlock of the UNet also receives
# what the matching DownBlock computed before it downsampled (a skip connection).

class Norm(nn.GroupNorm):
    """GroupNorm for any width. It brings each group of channels to mean 0 and std 1, and then
    scales and shifts each channel as learned. Each image is treated alone, whatever the batch."""
    def __init__(self, c):
        groups = math.gcd(32, c, c // 4 or 1)   # divides c, at most 32, each of 4 channels or more
        super().__init__(groups, c)

def zero(layer):
    """A zeroed layer adds nothing at first, so blocks start as their shortcut and the UNet answers
    0. It still learns, because its gradient is its input times the error."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class ResBlock(nn.Module):
    """Norm, SiLU, Conv, twice, plus the shortcut. emb sets a scale and a shift for the output of
    the second Norm. This is AdaGN (Dhariwal & Nichol 2021, arXiv 2105.05233)."""
    def __init__(self, c_in, c_out, emb_dim=None):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = zero(nn.Linear(emb_dim, 2 * c_out)) if emb_dim else None
        self.norm2 = Norm(c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):                                       # (B,c_in,H,W), (B,E)
        y = self.conv1(F.silu(self.norm1(x)))                             # (B,c_out,H,W)
        y = self.norm2(y)
        if self.emb is not None:
            scale_and_shift = self.emb(F.silu(emb))[:, :, None, None]     # (B,2·c_out,1,1)
            scale, shift = scale_and_shift.chunk(2, dim=1)                # (B,c_out,1,1) each
            y = y * (1 + scale) + shift
        y = self.conv2(F.silu(y))
        return self.shortcut(x) + y                                       # (B,c_out,H,W)

class AttentionBlock(nn.Module):
    """Every place sees all others (VQGAN Table 7), while a convolution shows it only its
    neighbours. Linear maps give each place a query, a key and a value. A place's output is the mean
    of all values, weighted by how well their keys fit its query: softmax(q·k/√C), Vaswani 2017.
    Only the MidBlock has attention, because its cost grows with (h·w)²."""
    def __init__(self, c):
        super().__init__()
        self.norm = Norm(c)
        self.attention = nn.MultiheadAttention(c, num_heads=1, batch_first=True)
        zero(self.attention.out_proj)

    def forward(self, x):                                                 # (B,C,h,w)
        y = rearrange(self.norm(x), "B C h w -> B (h w) C")               # (B,N,C)
        y, _ = self.attention(y, y, y, need_weights=False)    # queries, keys, values: all from y
        y = rearrange(y, "B (h w) C -> B C h w", h=x.shape[2])
        return x + y                                                      # (B,C,h,w)

class DownBlock(nn.Module):
    """Two ResBlocks, then a strided convolution that halves the grid."""
    def __init__(self, c_in, c_out, emb_dim=None):
        super().__init__()
        self.res1 = ResBlock(c_in, c_out, emb_dim)
        self.res2 = ResBlock(c_out, c_out, emb_dim)
        self.down = nn.Conv2d(c_out, c_out, 4, stride=2, padding=1)

    def forward(self, x, emb=None):                                       # (B,c_in,H,W)
        skip = self.res2(self.res1(x, emb), emb)                          # (B,c_out,H,W)
        return self.down(skip), skip                                      # (B,c_out,H/2,W/2)

class MidBlock(nn.Module):
    """ResBlock, self-attention, ResBlock, on the smallest grid."""
    def __init__(self, c, emb_dim=None):
        super().__init__()
        self.res1 = ResBlock(c, c, emb_dim)
        self.attention = AttentionBlock(c)
        self.res2 = ResBlock(c, c, emb_dim)

    def forward(self, x, emb=None):                                       # (B,C,h,w)
        y = self.res1(x, emb)
        y = self.attention(y)
        return self.res2(y, emb)                                          # (B,C,h,w)

class UpBlock(nn.Module):
    """The grid doubles, the skip's channels are appended, and two ResBlocks follow.
    trap: a transposed convolution computes even and odd pixels with different weights, and a mesh
    can show in the image (Odena 2016, distill.pub). Copying each cell to 2×2 avoids it."""
    def __init__(self, c_in, c_out, emb_dim=None, c_skip=0, upsample="nearest"):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        if upsample == "transposed":
            self.up = nn.ConvTranspose2d(c_in, c_in, 4, stride=2, padding=1)
        self.res1 = ResBlock(c_in + c_skip, c_out, emb_dim)
        self.res2 = ResBlock(c_out, c_out, emb_dim)

    def forward(self, x, emb=None, skip=None):                            # (B,c_in,h,w)
        y = self.up(x)                                                    # (B,c_in,2h,2w)
        if skip is not None:
            y = torch.cat([y, skip], dim=1)                               # (B,c_in+c_skip,2h,2w)
        return self.res2(self.res1(y, emb), emb)                          # (B,c_out,2h,2w)

def levels(widths):
    """(c_in, c_out) of each DownBlock: (16, 64) -> (16, 16), (16, 64). UpBlocks reverse it."""
    return list(zip([widths[0], *widths[:-1]], widths))
# ------------------------------------------------------------------------------------------------
# 5. Stage 1: the VQGAN
# The encoder makes the grid small, the codebook makes it discrete, and the decoder maps it back.
# Why discrete? In the VQGAN paper, because its stage 2 predicts code numbers one by one, like words
# of a text. Here, because rounding to the nearest code corrects what stage 2 gets slightly wrong.
# The codebook, K learned vectors, is delicate. Choosing the nearest one has no gradient, and a code
# that is never chosen never learns. Watch the share of codes in use and their perplexity, the
# exponential of the entropy of code frequencies. It is K if all codes are used equally.

class Encoder(nn.Module):
    """x -> z: Conv, m DownBlocks, MidBlock, Norm, SiLU, Conv (VQGAN Table 7)."""
    def __init__(self, widths, z_dim):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        down_levels = levels(widths)                                      # 16 → 16 → 64
        self.down = nn.ModuleList([DownBlock(c_in, c_out) for c_in, c_out in down_levels])
        self.mid = MidBlock(widths[-1])
        self.norm = Norm(widths[-1])
        self.last = nn.Conv2d(widths[-1], z_dim, 3, padding=1)

    def forward(self, x):                                                 # (B,3,H,W)
        y = self.first(x)
        for block in self.down:
            y, _ = block(y)                                               # the grid halves m times
        y = self.mid(y)
        return self.last(F.silu(self.norm(y)))                            # (B,d,h,w)

class Decoder(nn.Module):
    """z_q -> x_hat: the encoder's mirror image."""
    def __init__(self, widths, z_dim, upsample="nearest"):
        super().__init__()
        self.first = nn.Conv2d(z_dim, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1])
        self.up = nn.ModuleList()
        for c_out, c_in in reversed(levels(widths)):                      # 64 → 16 → 16
            self.up.append(UpBlock(c_in, c_out, upsample=upsample))
        self.norm = Norm(widths[0])
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q):                                               # (B,d,h,w)
        y = self.mid(self.first(z_q))
        for block in self.up:
            y = block(y)                                                  # the grid doubles m times
        y = F.silu(self.norm(y))
        # In fp32, since adaptive_weight compares two gradients of this layer. bf16 has few digits.
        with torch.autocast(y.device.type, enabled=False):
            return self.last(y.float())                                   # (B,3,H,W)

class Codebook(nn.Module):
    """Replaces each vector of z by the nearest of K learned ones (VQ sec. 3.1)."""
    def __init__(self, codes, z_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, z_dim)                       # (K,d)
        self.register_buffer("wins", torch.zeros(codes))      # (K,) wins since the last restart

    def nearest(self, z):                                                 # (B,d,h,w)
        """The nearest code's number, k = argmin_j ‖z - e_j‖ with e_j in row j (VQ eq. 1)."""
        B, d, h, w = z.shape
        # trap: in bf16 many choices are wrong. Two codes are often almost equally near, their
        # distances round to the same number, and argmin takes either. So distances are in fp32. All
        # vectors form one list, since a batched cdist would copy the codebook B times.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z.float(), "B d h w -> (B h w) d")           # (B·N,d)
            distance = torch.cdist(flat, self.embedding.weight)           # (B·N,K)
            k = distance.argmin(dim=1)
        return k.view(B, h, w)                                            # (B,h,w)

    def lookup(self, k):                                                  # (B,h,w)
        """z_q = e_k (VQ eq. 2). contiguous() orders it in memory, so later layers are faster."""
        return rearrange(self.embedding(k), "B h w d -> B d h w").contiguous()        # (B,d,h,w)

    def forward(self, z):                                                 # (B,d,h,w)
        """-> z_q (its gradient goes to z), k, codebook loss, commitment loss (VQ eq. 3)."""
        k = self.nearest(z)                                               # (B,h,w)
        z_q = self.lookup(k)                                              # (B,d,h,w)
        # One distance, two losses. sg[] decides who moves:
        #   codebook_loss   moves codes towards the vectors that chose them     weight 1
        #   commit_loss     moves the encoder's vectors towards their codes     --commit-weight
        # trap: VQGAN's code has these weights swapped, with 0.25 on the codebook loss and 1 on the
        # commitment. Both losses have the same value, so no curve shows the swap.
        codebook_loss = F.mse_loss(z_q, z.detach())             # mean of (sg[z] - e)²
        commit_loss = F.mse_loss(z, z_q.detach())               # mean of (z - sg[e])²
        # Straight through (VQ sec. 3.2). The value is z_q, but the gradient goes to z. Rounding has
        # no slope, so z gets the decoder's gradient for z_q, unchanged. This is a lie, but one that
        # points downhill while z and z_q are close. The two losses keep them close.
        # trap: if codebook_loss came after this line, from the new z_q, no code would ever learn.
        z_q = z + (z_q - z).detach()
        return z_q, k, codebook_loss, commit_loss

    # trap: the usual start, uniform in ±1/K, puts all codes near the origin. If encoder outputs lie
    # elsewhere, a few codes win everything and the rest never get a gradient: codebook collapse. So
    # codes start on encoder outputs, and unused ones restart there (Jukebox, arXiv 2005.00341).
    @torch.no_grad()
    def restart_unused(self, z, generator):
        """Move codes without a win since the last restart (at first, all) to vectors of z.
        Adam's averages stay. If you keep more for each code, reset it after the broadcast."""
        unused = self.wins == 0                                           # (K,)
        n = int(unused.sum())
        flat = rearrange(z, "B d h w -> (B h w) d")                       # (B·N,d)
        pick = torch.randint(len(flat), (n,), generator=generator)
        jitter = torch.randn(n, flat.shape[1], generator=generator).to(z.device)
        jitter *= 0.01 * flat.std(0, correction=0)                        # so that no two are alike
        self.embedding.weight[unused] = flat[pick] + jitter
        self.wins.zero_()
        if world() > 1:                     # each process has different vectors: take the first's
            dist.broadcast(self.embedding.weight.data, 0)

    def count_wins(self, k):
        """Add up how often each code was chosen in this step, in all processes."""
        wins = torch.bincount(k.flatten(), minlength=len(self.wins)).float()
        self.wins += sum_over_processes(wins)

class VQGAN(nn.Module):
    """Encoder, codebook and decoder, for images in [-1,1] whose sides are multiples of f = 2^m."""
    def __init__(self, widths, z_dim, codes, upsample="nearest"):
        super().__init__()
        self.encoder = Encoder(widths, z_dim)
        self.codebook = Codebook(codes, z_dim)
        self.decoder = Decoder(widths, z_dim, upsample)

    def forward(self, x):                                                 # (B,3,H,W)
        """-> x_hat (B,3,H,W), z (B,d,h,w), k (B,h,w), codebook loss, commitment loss."""
        z = self.encoder(x).float()
        z_q, k, codebook_loss, commit_loss = self.codebook(z)
        return self.decoder(z_q), z, k, codebook_loss, commit_loss
    def encode(self, x):
        """x (B,3,H,W) -> code numbers k (B,h,w). Stage 2 never sees more of an image."""
        return self.codebook.nearest(self.encoder(x))
    def decode(self, k):
        """Code numbers k (B,h,w) -> x_hat (B,3,H,W)."""
        return self.decoder(self.codebook.lookup(k))

def frequencies(k, codes):
    """How often each code occurs in the grids k -> (K,), summing to 1."""
    return torch.bincount(k.flatten(), minlength=codes) / k.numel()
# ------------------------------------------------------------------------------------------------
# 6. Stage 1: the losses
# The squared error alone gives blur, because its best answer is the mean of all sharp images that
# fit the code. LPIPS sends both images through a frozen network trained to classify photographs,
# and sums weighted differences of their feature maps. Blurred and sharp hair give different
# features. What still gives a reconstruction away is left to a GAN, two networks that compete. The
# discriminator D learns to give high numbers (logits) to real images and low ones to
# reconstructions. The VQGAN, here the generator, learns to get high ones for its reconstructions.

def load_lpips(wanted, device):
    """LPIPS (Zhang 2018, arXiv 1801.03924) for images in [-1,1]. None if it is off or its weights
    are missing. It is called outside autocast, so never in bf16.
    trap: as a part of the VQGAN it would be in every checkpoint, and .train() start its dropout."""
    if wanted == "off":
        return None
    try:
        warnings.filterwarnings("ignore", module="torchvision")     # meant for lpips' authors
        import lpips
        net = lpips.LPIPS(net="squeeze", verbose=False)
        return net.to(device).eval().requires_grad_(False)
    except Exception as e:              # URLError, OSError, a damaged file
        say("WARNING no LPIPS:", e, "- its weights belong in", torch.hub.get_dir() + "/checkpoints")

class PatchDiscriminator(nn.Module):
    """D gives a logit for each place of the latent grid, high where the image looks real. A logit
    sees 18×18 pixels at f = 4, 38 at f = 8 and 78 at f = 16, enough to judge the grain. The 70×70
    of pix2pix (arXiv 1611.07004) are more than a 64×64 image has. There is no sigmoid at the end,
    because hinge_loss wants raw logits. Norm, not BatchNorm, so that each image is judged alone."""
    def __init__(self, widths):                                           # the VQGAN's
        super().__init__()
        c = max(32, widths[0] // 2)             # first layer: half the VQGAN's, but 32 at least
        layers = [nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in widths[1:]:                                              # f = 4: 3 → 32 → 64 → 1
            layers += [nn.Conv2d(c, 2 * c, 4, stride=2, padding=1), Norm(2 * c), nn.LeakyReLU(0.2)]
            c *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, x):                                                 # (B,3,H,W)
        return self.layers(x).float()                                     # (B,1,h,w)

def hinge_loss(real, fake):
    """D's loss from its logits. A real one above 1 or a fake one below -1 costs nothing. (The paper
    has a log loss, VQGAN eq. 5. Its authors' code uses this hinge loss, and so do we.) The
    generator's loss is -fake.mean(), which is low where D takes the fake for real."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

def adaptive_weight(rec, adversarial, last, limit):
    """lam = ‖∇_L rec‖ / (‖∇_L adversarial‖ + δ), VQGAN eq. 7. Below its limit, lam·adversarial
    pushes as hard as rec, though its own gradient may be a thousand times larger or smaller than
    that of rec, and changes as D learns. L is the decoder's last layer, since all weights would
    cost two more backward passes. lam is a constant for backward(). Otherwise the VQGAN could lower
    its loss by shrinking lam instead of improving its images."""
    def push(loss):                                         # ‖∇_L loss‖, without create_graph
        (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
        return mean_over_processes(gradient).norm()
    lam = push(rec) / (push(adversarial) + 1e-4)    # a constant. δ, as the push may be nearly 0
    # trap: a D that cannot tell real from fake has a tiny, meaningless gradient. VQGAN's code
    # allows a lam of 1e4, which enlarges it: x_hat jumps about, and D can never catch up. At our
    # limit, reached in three of four steps, the GAN pushes less than rec does.
    return lam.clamp(max=limit)
# ------------------------------------------------------------------------------------------------
# 7. Stage 1: training
# In each step the generator learns first, then D learns on the same images. D joins after a tenth
# of the run, since from the first blobs it would learn only that blur is fake. Watch mse and lpips
# fall while codes used and perplexity rise. Watch also D's mean logits. With the hinge loss, a gap
# d_real - d_fake of 0.2 to 0.6 is healthy. Above 1, D is far ahead. At 0, it is blind. The
# appendices hold Run, which counts steps, saves and says when to measure (C), draw_rows for
# pictures (D), reconstruct, which measures (E), and Muon, the optimiser of the kernels (F).

def build_vq(cfg, device):
    """-> VQGAN and D, with their initial weights."""
    unit = 4 * 2 ** len(cfg.widths)             # 4·f, since the UNet's default halves h and w twice
    demand(32 <= cfg.size <= 4096 and cfg.size % unit == 0,
           f"--size: from 32 to 4096, a multiple of {unit}")
    torch.manual_seed(cfg.seed % 2**63)         # so that any --seed is accepted
    vqgan = VQGAN(cfg.widths, cfg.z_dim, cfg.codes, cfg.upsample)
    return vqgan.to(device), PatchDiscriminator(cfg.widths).to(device)

def vq_optimizers(vqgan, disc, cfg):
    """-> Adam and Muon for the VQGAN, Adam for D with VQGAN's betas. For Muon see appendix F."""
    enc, dec = vqgan.encoder, vqgan.decoder
    blocks = nn.ModuleList([enc.down, enc.mid, dec.mid, dec.up])
    kinds = nn.Conv2d, nn.ConvTranspose2d
    convs = [layer for layer in blocks.modules() if isinstance(layer, kinds)]
    kernels = [conv.weight for conv in convs] if cfg.muon_lr > 0 else []
    codes = vqgan.codebook.embedding.weight
    rest = [p for p in vqgan.parameters() if p not in {codes, *kernels}]  # compared as objects
    # Codes need a rate of their own to keep up with z (Łańcucki 2020, arXiv 2005.08520). A weight
    # on codebook_loss would change little, since Adam divides a gradient by its usual size.
    groups = [{"params": rest}, {"params": [codes], "lr": cfg.codes_lr}]
    adam = torch.optim.Adam(groups, cfg.lr, betas=(0.9, 0.99), fused=True)
    adam_d = torch.optim.Adam(disc.parameters(), cfg.d_lr, betas=(0.5, 0.9), fused=True)
    return adam, Muon(kernels, cfg.muon_lr), adam_d

@torch.no_grad()
def start_codes(vqgan, images, seed):
    """Put all codes on encoder outputs of 64 random training images."""
    some = images.train[shuffled(len(images.train), seed, 0)[:64]]
    x = to_float(images.rows(some)).to(vqgan.codebook.wins.device)
    vqgan.codebook.restart_unused(vqgan.encoder(x), rng(seed, "first codes"))

def augment(x, turns):
    """Turn or mirror each image of x (B,C,H,H). turns (B,) in 0…7 picks one of the square's eight
    symmetries. A skin lesion has no right way up, so all eight are equally likely."""
    turned = []
    for image, turn in zip(x, turns.tolist()):
        if turn >= 4:
            image = image.flip(2)
        turned.append(image.rot90(turn % 4, (1, 2)))
    return torch.stack(turned)

def train_vq(cfg, state=None):
    """Stage 1, from images to a checkpoint. state is a checkpoint to go on from. -> exit status"""
    device, mixed = pick_device(cfg)
    vqgan, disc = build_vq(cfg, device)
    images = Images(cfg.data, cfg, cfg.folder.parent / "cache", state["seen"] if state else ())
    lpips = load_lpips(cfg.lpips, device)
    adam, muon, adam_d = vq_optimizers(vqgan, disc, cfg)
    parts = {"model": vqgan, "disc": disc, "adam": adam, "muon": muon, "adam_d": adam_d}
    run = Run(cfg, images, parts, {}, state)
    if not state:
        draw_preview(cfg.folder / "data_preview.png", images)
        start_codes(vqgan, images, cfg.seed)

    for step in run:
        for optimizer in (adam, muon, adam_d):
            set_learning_rate(optimizer, rate(step, run.progress))
        rows = images.train[next_rows(run.n, step, cfg.batch_size, cfg.seed)]             # (B,)
        turns = torch.randint(8, (cfg.batch_size,), generator=rng(cfg.seed, "turns", step))
        x = to_float(images.rows(share(rows)))
        x = augment(x, share(turns)).to(device)                               # (B,3,H,W) in [-1,1]

        # ---- the generator: encoder, codebook, decoder ----
        with mixed:
            x_hat, z, k, codebook_loss, commit_loss = vqgan(x)
        mse = F.mse_loss(x_hat, x)                      # as in both papers. VQGAN's code uses L1
        losses = {"mse": mse, "codebook": codebook_loss}
        rec = mse
        if lpips:
            losses["lpips"] = lpips(x_hat, x).mean()
            rec = rec + cfg.lpips_weight * losses["lpips"]
        loss = rec + codebook_loss + cfg.commit_weight * commit_loss   # VQGAN eq. 4, VQ eq. 3

        gan_on = cfg.gan_weight > 0 and run.progress >= cfg.gan_start
        if gan_on:
            with mixed:
                real, fake = disc(x), disc(x_hat)
            adversarial = -fake.mean()
            lam = adaptive_weight(rec, adversarial, vqgan.decoder.last.weight, cfg.lam_max)
            loss = loss + cfg.gan_weight * lam * adversarial                  # VQGAN eq. 6

        if run.skip_step(descend(loss, vqgan, adam, muon)):
            continue                            # one bad batch must not end a night's run
        vqgan.codebook.count_wins(k)
        if step % 50 == 49:
            vqgan.codebook.restart_unused(z, rng(cfg.seed, "restart", step))

        # ---- the discriminator, on the same images ----
        if gan_on:
            # trap: without detach, d_loss would also run back through the VQGAN. D(x_hat) is
            # computed anew, since loss.backward() freed its graph, but not that of real.
            with mixed:
                fake = disc(x_hat.detach())
            d_loss = hinge_loss(real, fake)
            descend(d_loss, disc, adam_d)
            losses.update(lam=lam, d_loss=d_loss, d_real=real.mean(), d_fake=fake.mean())

        # ---- report; at each tenth of the run and every ten minutes measure, draw, save ----
        run.report(losses)
        if run.begin_look():
            some = images.rows(images.val[:256])                              # never trained on
            held, copies = reconstruct(vqgan, some, lpips, mixed)
            draw_rows(run.picture("recon"), {"original": some, "reconstruction": copies})
            run.end_look(held)

    if not lpips:
        say("trained WITHOUT LPIPS")
    return run.finish("next: python vqldm.py train-ldm --vq")
# ------------------------------------------------------------------------------------------------
# 8. Stage 2: diffusion
# Noise is added to a latent in T small steps, until only noise is left. A network learns to tell
# the noise from the latent. Sampling starts from pure noise and walks back.
#
# The noise levels are t = 0…T-1. Level 0 already has a little noise, so the clean latent z0 lies
# one level below it, at level -1. One step of noising mixes in fresh normal noise ε:
#     z_t = √α_t z_(t-1) + √β_t ε                 where α_t + β_t = 1
# If z_(t-1) has variance 1, then z_t also has variance α_t + β_t = 1.
#
# All steps up to t can be taken at once. With ᾱ_t = α_0 · … · α_t,
#     z_t = √ᾱ_t z0 + √(1-ᾱ_t) ε                  DDPM eq. 4
# To see this, substitute z_(t-1). The old noise now has variance α_t (1-ᾱ_(t-1)), the new noise
# adds β_t, and the sum is 1-ᾱ_t. So ᾱ_t is the share of z_t's variance that comes from z0.
#
# The network is given z_t and t. Its answer is ε, as in DDPM, or by default
#     v = √ᾱ_t ε - √(1-ᾱ_t) z0                    Salimans 2022
# Why v? At high noise levels z_t is almost pure ε, so even an excellent estimate of ε says little
# about z0. There v is close to -z0. At low noise levels v is close to ε. So v is always what z_t
# hides. From either answer, predict() makes two estimates, z0_hat and eps_hat.
#
# Why many steps, if the first already gives z0_hat? Under heavy noise, many different z0 are
# possible, and the best answer under squared error is their mean, which is a blur. So we go a
# little way towards it and ask again. By then fewer z0 are possible.

class Diffusion:
    """A noise schedule, the loss of DDPM (Algorithm 1) and two samplers (Algorithm 2, DDIM). A new
    schedule is a word in LDMConfig and a branch here."""
    def __init__(self, T=1000, schedule="cosine", target="v"):
        self.T, self.target = T, target
        if schedule == "linear":
            # trap: 1e-4 and 0.02 belong to T = 1000. Unscaled, T = 50 ends at ᾱ = 0.60, and
            # sampling starts from noise that the network never saw.
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        else:                                   # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
            part = torch.arange(T + 1, dtype=torch.float64) / T              # 0…1
            # ᾱ is this curve divided by its start. It falls more evenly than linear's, whose last
            # third is nearly all noise. Without 0.008, level 0 would have too little noise to see.
            curve = torch.cos((part + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - curve[1:] / curve[:-1]           # α is the quotient of neighbouring ᾱ
        alpha = 1 - beta.clamp(max=0.999)       # β = 1 gives ᾱ = 0, and predict() divides by √ᾱ
        alpha_bar = alpha.cumprod(0)            # in float64: rounded once, not T times
        demand(alpha_bar[T - 1] < 0.05, "--T: too few levels to end in pure noise")
        # We append a 1, so that alpha_bar[-1] belongs to level -1, to z0 itself.
        self.alpha_bar = F.pad(alpha_bar, (0, 1), value=1).float()            # (T+1,)

    def abar_at(self, t, z):
        """ᾱ_t in a shape that multiplies z. t is (B,), or one number for all."""
        abar = self.alpha_bar.to(z.device)[t]                                 # (B,)
        return abar.view(-1, 1, 1, 1)                                     # (B,1,1,1)

    def add_noise(self, z0, t, eps):                                          # (B,d,h,w), (B,)
        """All steps at once, DDPM eq. 4: z_t = √ᾱ z0 + √(1-ᾱ) ε."""
        abar = self.abar_at(t, z0)
        return abar.sqrt() * z0 + (1 - abar).sqrt() * eps                     # (B,d,h,w)

    def goal(self, z0, eps, abar):
        """What the network should answer. A new target: branches here, in predict and weight."""
        if self.target == "eps":
            return eps
        return abar.sqrt() * eps - (1 - abar).sqrt() * z0       # v, Salimans app. D

    def predict(self, out, z_t, t):
        """The network's answer -> (z0_hat, eps_hat), both (B,d,h,w).
        trap: with ε, an error of the network enters z0_hat multiplied by √(1-ᾱ)/√ᾱ. At t = 999 that
        is 157 with linear and 20,291 with cosine, so colours are off. With v it is at most 1. Much
        code clips z0_hat to ±1, right for pixels. Here z0 has std 1 and goes beyond."""
        abar = self.abar_at(t, z_t)
        if self.target == "eps":                    # DDPM eq. 4, solved for z0
            z0_hat = (z_t - (1 - abar).sqrt() * out) / abar.sqrt()
            return z0_hat, out
        # Write √ᾱ = cos φ and √(1-ᾱ) = sin φ. Then (z_t, v) is (z0, ε), rotated by the angle -φ,
        # and rotating it back gives z0 and ε (Salimans app. D).
        z0_hat = abar.sqrt() * z_t - (1 - abar).sqrt() * out
        eps_hat = (1 - abar).sqrt() * z_t + abar.sqrt() * out
        return z0_hat, eps_hat

    def loss(self, net, z0, t, eps, label):
        """Algorithm 1 -> (B,), the mean of (goal - net(z_t, t))². An output of 0 costs about 1."""
        out = net(self.add_noise(z0, t, eps), t, label)
        goal = self.goal(z0, eps, self.abar_at(t, z0))
        return F.mse_loss(out, goal, reduction="none").flatten(1).mean(1)     # (B,)

    def weight(self, t):
        """The weight of level t (B,) in training on v. It is 1 where ᾱ = 1/2, and 1/4 at both ends,
        so that all levels are learned. At low noise levels, an error of v enters z0_hat multiplied
        by √(1-ᾱ), which is nearly 0. At high ones v is about -z0, of which z_t shows nothing, so
        the error stays near 1. With cosine, but for the 1/4, this is the sigmoid weight of Kingma &
        Gao 2023 (arXiv 2303.00848)."""
        abar = self.alpha_bar.to(t.device)[t]
        if self.target == "eps":                    # all levels count alike, as in DDPM
            return torch.ones_like(abar)
        return (4 * abar * (1 - abar)).sqrt().clamp(min=0.25)                 # (B,)

    def pairs(self, steps):
        """Exactly `steps` pairs (t, t_prev), from T-1 down to -1. Each step goes from t to t_prev.
        trap: range(0, T, T // steps) can give too many, 1000 levels for 600 steps of T = 1000."""
        ts = [self.T - 1 - self.T * i // steps for i in range(steps + 1)]
        return list(zip(ts, ts[1:]))                            # each with the next
    @torch.no_grad()
    def sample(self, net, z, steps, sampler, noise):
        """Walk back from z (B,d,h,w), which is standard normal noise. net(z_t, t) answers, and
        noise() draws fresh numbers in the shape of z. After each step this yields z at its new
        level, and z0_hat. The last z is the sample."""
        for t, t_prev in self.pairs(steps):
            abar = self.abar_at(t, z)
            abar_prev = self.abar_at(t_prev, z)
            t_all = torch.full((len(z),), t, device=z.device)                 # (B,)
            z0_hat, eps_hat = self.predict(net(z, t_all), z, t_all)

            if sampler == "ddim":
                # Add the noise just found to z0_hat again, but only up to level t_prev. Nothing
                # here is random, so the first z decides everything (DDIM eq. 12 with σ = 0).
                z = abar_prev.sqrt() * z0_hat + (1 - abar_prev).sqrt() * eps_hat
            else:
                # DDPM, Algorithm 2, line 4. Take some of the noise away, then add fresh noise, of
                # variance 1-α.
                # trap: a step may span several levels. ᾱ is a product, so the α of the whole step
                # is ᾱ_t / ᾱ_prev. With the α_t of one level, each step would take away too little.
                alpha = abar / abar_prev
                z = (z - (1 - alpha) / (1 - abar).sqrt() * eps_hat) / alpha.sqrt()
                # trap: noise after the last step leaves a grain in every sample.
                if t_prev >= 0:
                    z = z + (1 - alpha).sqrt() * noise()
            yield z, z0_hat
# ------------------------------------------------------------------------------------------------
# 9. Stage 2: the UNet
# The same blocks as in the VQGAN. Two things are new. Every ResBlock is told the noise level t and
# the class. And skip connections carry what no bottleneck can, the noise, new at every place.

def time_embedding(t, dim):
    """t (B,) -> (B,dim), sines and cosines of growing period (Vaswani 2017, arXiv 1706.03762). The
    fast ones tell neighbouring levels apart, the slow ones distant levels. As plain numbers, 500
    and 501 would be nearly the same input."""
    frequency = 10_000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))   # (dim/2,)
    angle = t.float()[:, None] * frequency                                # (B,dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                   # (B,dim)

class UNet(nn.Module):
    """(z_t, t, class) -> v or ε. The classes are 0…n_classes-1. The number n_classes stands for an
    unknown class, given to one training latent in ten (section 10), since guidance needs an answer
    without a class (section 11). With n_classes = 0 the network is unconditional."""
    def __init__(self, z_dim, widths, n_classes, upsample="nearest"):
        super().__init__()
        E = 4 * widths[0]
        self.n_classes = n_classes
        self.time = nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, E))
        self.label = nn.Embedding(n_classes + 1, E) if n_classes else None
        self.first = nn.Conv2d(z_dim, widths[0], 3, padding=1)
        down_levels = levels(widths)                                      # 64 → 64 → 128
        self.down = nn.ModuleList([DownBlock(c_in, c_out, E) for c_in, c_out in down_levels])
        self.mid = MidBlock(widths[-1], E)
        # Each UpBlock mirrors a DownBlock. Its skip has as many channels as what comes from below:
        # 128 + 128 → 64, then 64 + 64 → 64. (DDPM has one skip for each ResBlock.)
        self.up = nn.ModuleList()
        for c_out, c_in in reversed(down_levels):
            self.up.append(UpBlock(c_in, c_out, E, c_in, upsample))
        self.norm = Norm(widths[0])
        self.last = zero(nn.Conv2d(widths[0], z_dim, 3, padding=1))

    def forward(self, z_t, t, label=None):                                # (B,d,h,w), (B,), (B,)
        emb = self.time(time_embedding(t, self.time[0].in_features))      # (B,E)
        if self.label is not None:
            if label is None:
                label = torch.full_like(t, self.n_classes)
            emb = emb + self.label(label)           # so time and class reach each block together
        y = self.first(z_t)
        skips = []
        for block in self.down:
            y, skip = block(y, emb)                                       # the grid halves
            skips.append(skip)
        y = self.mid(y, emb)
        for block in self.up:
            y = block(y, emb, skips.pop())                                # the grid doubles
        return self.last(F.silu(self.norm(y))).float()                    # (B,d,h,w)

def build_unet(cfg, vq_cfg, classes):
    factor = 2 ** len(cfg.widths)
    demand(vq_cfg.side % factor == 0, "--widths: the codes' grid cannot be halved so many times")
    n_classes = 0 if cfg.unconditional else len(classes)
    return UNet(vq_cfg.z_dim, cfg.widths, n_classes, cfg.upsample)
# ------------------------------------------------------------------------------------------------
# 10. Stage 2: training
# The frozen encoder turns each image into its grid of code numbers, once. These grids are the data
# of stage 2. That is fast, but images are no longer turned. The latents are the codes, exactly what
# the decoder reads, as in Nguyen 2024 (arXiv 2410.14758). LDM takes z before quantisation.
# Diffusion ends in noise of mean 0 and std 1, so we bring the codes to that mean and std. Judge the
# model by its samples, since even a perfect network's loss stays well above 0. load_vqgan and
# LatentDiffusion are in section 11, Run and load_checkpoint in C.

def encode_images(vqgan, images, device, mixed):
    """All images -> their code numbers (n,h,w). 4,096 images in 16×16 codes take 4 MB."""
    grids = []
    for rows in bar(torch.arange(len(images.names)).split(16), "encoding"):
        with mixed:
            k = vqgan.encode(to_float(images.rows(rows)).to(device))      # (16,h,w)
        grids.append(k.int().cpu())
    return torch.cat(grids)

def measure_scale(k, e):
    """Mean and std of the codes e (K,d), weighted by how often they occur in the grids k -> (2,d).
    One pair for each channel, as in Karras 2024 (arXiv 2312.02696). LDM's app. G has one std."""
    p = frequencies(k, len(e)).to(e)[:, None]                             # (K,1)
    mean = (p * e).sum(0)
    variance = (p * (e - mean) ** 2).sum(0)
    return torch.stack([mean, variance.clamp(min=1e-12).sqrt()])

def standardise(z, scale):
    """z (B,d,h,w) -> z0. The way back is unstandardise, and nothing else uses this scale.
    trap: with a std copied from another model, colours and contrast come out wrong."""
    mean, std = scale.view(2, -1, 1, 1)                                   # (d,1,1) each
    return (z - mean) / std
def unstandardise(z0, scale):
    mean, std = scale.view(2, -1, 1, 1)
    return z0 * std + mean

class Latents:
    """The data of stage 2: the code grid of each image, its label, and the scale of the codes."""
    def __init__(self, cfg, images, vqgan, device, mixed):
        self.codebook = vqgan.codebook
        self.device = device
        self.classes, self.labels = images.classes, images.labels
        if cfg.unconditional:
            demand(not cfg.balance, "--balance: needs classes, so leave out --unconditional")
            self.classes, self.labels = ["images"], torch.zeros_like(images.labels)
        self.class_counts = torch.bincount(self.labels[images.train], minlength=len(self.classes))
        self.grids = encode_images(vqgan, images, device, mixed)          # (images,h,w)
        self.scale = measure_scale(self.grids[images.train], self.codebook.embedding.weight)

    def z0(self, rows):
        """Row numbers (B,) -> code numbers -> codes -> standardised latents z0 (B,d,h,w)."""
        z_q = self.codebook.lookup(self.grids[rows].to(self.device))
        return standardise(z_q, self.scale)

@torch.no_grad()
def update_ema(ema, net, step, decay):
    """ema <- decay·ema + (1-decay)·net, the running mean of the weights, used for sampling. Single
    steps scatter around the optimum, and their mean lies closer to it.
    trap: with 0.9999 from the first step on, 1,000 steps keep 90 % of the random first weights."""
    decay = min(decay, (1 + step) / (10 + step))        # 0.1 at step 0, 0.9 at 80, 0.99 at 890
    for mean, p in zip(ema.parameters(), net.parameters()):
        mean.lerp_(p, 1 - decay)

def look_ldm(model, data, rows, path, steps):
    """The held-out loss of a LatentDiffusion, and 16 samples drawn to path. The noise is the same
    at each look, so that looks can be compared."""
    z0, label = data.z0(rows), data.labels[rows].to(model.device)
    t = (torch.arange(len(z0), device=z0.device) * model.cfg.T) // len(z0)  # (n,) evenly spaced
    eps = torch.randn(z0.shape, generator=rng("held-out noise")).to(z0.device)
    with model.mixed:
        loss = model.diffusion.loss(model.net, z0, t, eps, label)                         # (n,)
    classes = model.trained[(torch.arange(16) * len(model.trained)) // 16]    # evenly spread
    pictures, latents = model.images(replace(model.cfg, steps=steps), range(16), classes)
    draw_rows(path, {"samples": pictures})
    return {"loss": float(loss.mean()), "latent_std": float(latents.std())}

def build_ldm(cfg, vq_cfg, classes, device):
    """-> UNet, ema (its running mean), guide (an early copy of ema, see guided), Adam."""
    torch.manual_seed(cfg.seed % 2**63)         # the initial weights
    net = build_unet(cfg, vq_cfg, classes).to(device)
    ema = deepcopy(net).requires_grad_(False)
    adam = torch.optim.Adam(net.parameters(), cfg.lr, betas=(0.9, 0.99), fused=True)
    return net, ema, deepcopy(ema), adam

def train_ldm(cfg, state=None):
    """Stage 2, from a stage-1 checkpoint to one that holds both stages. -> exit status"""
    diffusion = Diffusion(cfg.T, cfg.schedule, cfg.target)
    device, mixed = pick_device(cfg)
    vq = state["vq"] if state else load_checkpoint(cfg.vq, "--vq", "vq")
    vqgan, vq_cfg = load_vqgan(vq, device)
    images = Images(vq_cfg.data, vq_cfg, cfg.folder.parent / "cache", (state or vq)["seen"])
    net, ema, guide, adam = build_ldm(cfg, vq_cfg, images.classes, device)
    data = Latents(cfg, images, vqgan, device, mixed)
    demand(not state or data.classes == state["classes"], "--resume: the classes have changed")
    parts = {"model": net, "ema": ema, "guide": guide, "adam": adam}
    facts = {"scale": data.scale.cpu(), "classes": data.classes, "class_counts": data.class_counts,
             "vq": {name: vq[name] for name in ("config", "model")}}
    run = Run(cfg, images, parts, facts, state)

    for step in run:
        set_learning_rate(adam, rate(step, run.progress))
        dice = rng(cfg.seed, "step", step)
        chosen = next_rows(run.n, step, cfg.batch_size, cfg.seed)             # (B,)
        if cfg.balance:
            p = 1 / data.class_counts[data.labels[images.train]]          # (n,) up to a factor
            chosen = p.multinomial(cfg.batch_size, replacement=True, generator=dice)      # instead
        rows = images.train[chosen]                                           # (B,)
        # trap: 0…T-2 would leave out pure noise, where sampling starts; 1…T-1 the cleanest z_t.
        t = torch.randint(cfg.T, (cfg.batch_size,), generator=dice)           # (B,) in 0…T-1
        eps = torch.randn(cfg.batch_size, vq_cfg.z_dim, vq_cfg.side, vq_cfg.side, generator=dice)
        hidden = torch.rand(cfg.batch_size, generator=dice) < 0.1             # (B,)
        label = data.labels[rows].masked_fill(hidden, len(data.classes))      # (B,) a tenth hidden
        z0 = data.z0(share(rows))                                             # (B,d,h,w)
        t, eps, label = [share(x).to(device) for x in (t, eps, label)]

        with mixed:
            loss = diffusion.loss(net, z0, t, eps, label)                     # (B,) Algorithm 1
        weighted = (loss * diffusion.weight(t)).mean()
        if run.skip_step(descend(weighted, net, adam)):
            continue
        update_ema(ema, net, step, cfg.ema)
        if run.progress < 0.2:                  # no more copies after that, so it stays young
            guide.load_state_dict(ema.state_dict())

        # ---- report; look as in stage 1 ----
        run.report({"loss": loss.mean()})       # without the weight, so that 1 = nothing learned
        if run.begin_look():
            model = LatentDiffusion(run.checkpoint(), device, mixed)
            steps = cfg.steps if run.fraction_done() >= 1 else min(cfg.steps, 100)    # quick looks
            held = look_ldm(model, data, images.val[:256], run.picture("samples"), steps)
            run.end_look(held)

    return run.finish("next: python vqldm.py sample --ckpt")
# ------------------------------------------------------------------------------------------------
# 11. Sampling
# Walk back from noise in S steps, unstandardise, decode. A checkpoint of stage 2 also holds its
# VQGAN. load_checkpoint and reading() are in C, draw_rows is in D.

def guided(net, guide, label, w, guide_until):
    """-> a net(z_t, t) that is led towards its class by classifier-free guidance (CFG eq. 6):
        out = weak + w (strong - weak)        w is --guidance
    strong is told the class and weak is not. w = 1 is strong alone. A larger w goes further in the
    direction in which the class pulls. (CFG's own w is this w minus 1.) At level
    guide_until and above there is no guidance, because it would cost variety there (Kynkäänniemi
    2024, arXiv 2404.07724).
    ours: weak has two faults. As in CFG, it is not told the class, so w leads towards the class.
    It is also the younger self, the running mean after a fifth of the run. It makes the mistakes of
    strong, only larger, so moving away from it also removes errors. (Karras 2024, arXiv 2406.02507,
    guides by a smaller and younger network that is told the class.)"""
    def answer(z_t, t):
        strong = net(z_t, t, label)
        if w == 1 or t[0] >= guide_until:           # here all t are equal
            return strong
        weak = guide(z_t, t)
        return weak + w * (strong - weak)
    return answer

def frozen(net, weights, device):                       # in eval mode, without gradients
    net.load_state_dict(weights)
    return net.to(device).eval().requires_grad_(False)
def load_vqgan(state, device):                          # -> VQGAN of a checkpoint, its settings
    with reading("the VQGAN"):                          # an error in here becomes one sentence
        cfg = VQConfig(**state["config"])
        vqgan = VQGAN(cfg.widths, cfg.z_dim, cfg.codes, cfg.upsample)
        return frozen(vqgan, state["model"], device), cfg

class LatentDiffusion:
    """All that makes images: the UNet's running mean, its guide, Diffusion, the VQGAN, the scale,
    the classes, and how many images of each class were trained on."""
    def __init__(self, state, device, mixed):
        self.device, self.mixed = device, mixed
        self.vqgan, self.vq_cfg = load_vqgan(state.get("vq"), device)
        with reading("the UNet"):
            self.cfg = LDMConfig(**state["config"])
            self.diffusion = Diffusion(self.cfg.T, self.cfg.schedule, self.cfg.target)
            self.classes, self.class_counts = state["classes"], state["class_counts"].float()
            self.trained = self.class_counts.nonzero().flatten()    # classes that training saw
            self.scale = state["scale"].view(2, self.vq_cfg.z_dim).to(device)     # (2,d)
            net = build_unet(self.cfg, self.vq_cfg, self.classes)
            self.guide = frozen(deepcopy(net), state["guide"], device)
            self.net = frozen(net, state["ema"], device)

    def noise(self, seed, numbers):
        """A function that draws the next noise (B,d,h,w). Image i has the same in any batch."""
        own = [rng(seed, "sample", i) for i in numbers]
        shape = self.vq_cfg.z_dim, self.vq_cfg.side, self.vq_cfg.side
        def draw():
            return torch.stack([torch.randn(shape, generator=g) for g in own]).to(self.device)
        return draw

    def walk(self, how, numbers, label):
        """Yields (z at its new level, z0_hat) after each step. It runs only while you iterate, so
        do that inside `mixed`. how is any object with seed, sampler, steps and guidance."""
        draw = self.noise(how.seed, numbers)
        # The first level with ᾱ below 0.1, found by counting. The last entry is no level, so -1.
        guide_until = (self.diffusion.alpha_bar >= 0.1).sum() - 1
        net = guided(self.net, self.guide, label.to(self.device), how.guidance, guide_until)
        steps = min(how.steps, self.cfg.T)
        return self.diffusion.sample(net, draw(), steps, how.sampler, draw)

    def decode(self, z0):
        """Latents z0 (B,d,h,w) -> uint8 images (B,3,H,W).
        trap: the decoder has only ever seen codes, so what stage 2 makes is rounded to codes."""
        with self.mixed:
            k = self.vqgan.codebook.nearest(unstandardise(z0, self.scale))
            return to_bytes(self.vqgan.decode(k))

    def images(self, how, numbers, label):
        """-> uint8 images (n,3,H,W) and their latents z0 (n,d,h,w), on the CPU. Image numbers[i]
        has class label[i], and noise that follows from how.seed and its number."""
        pictures, latents = [], []
        starts = range(0, len(label), 32)
        if len(starts) > 1:
            starts = bar(starts, "sampling")
        for i in starts:
            batch = slice(i, i + 32)
            with self.mixed:
                for z_t, _ in self.walk(how, numbers[batch], label[batch]):
                    z0 = z_t                            # only the last one is kept
            pictures.append(self.decode(z0))
            latents.append(z0.cpu())
        return torch.cat(pictures), torch.cat(latents)

def load(where, device="auto"):
    """For use from Python: a run folder or checkpoint of train-ldm -> LatentDiffusion."""
    state = load_checkpoint(where, "load", "ldm")
    return LatentDiffusion(state, *pick_device(Settings(device=device)))

def sample(cfg, state):
    """New images as PNGs in a folder for each class, and grid.png."""
    demand(not any(cfg.folder.glob("*")), f"--out {cfg.folder}: is not empty; name a new folder")
    model = LatentDiffusion(state, *pick_device(cfg))
    classes = model.trained
    if cfg.class_:
        demand(cfg.class_ in model.classes, f"--class: must be one of {model.classes}")
        classes = torch.tensor([model.classes.index(cfg.class_)])
    label = classes[torch.arange(cfg.n) % len(classes)]                   # (n,) each in turn
    folders = [cfg.folder / re.sub(r"[^\w ,+-]", "_", name) for name in model.classes]
    for c in classes:                           # now, so that an unwritable place fails at once
        folders[c].mkdir(parents=True, exist_ok=True)
    made = []
    stds = []
    for part in bar(torch.arange(cfg.n).split(32), "sampling"):
        pictures, latents = model.images(cfg, part.tolist(), label[part])
        made.append(pictures)
        stds.append(latents.std())
        for i, image in zip(part.tolist(), pictures):       # written as soon as they are made
            write_png(image, f"{folders[label[i]]}/{i:05d}.png")
    made = torch.cat(made)
    rows = {model.classes[c]: made[label == c] for c in label.unique()}
    draw_rows(cfg.folder / "grid.png", rows)
    say(f"latents have std {torch.stack(stds).mean():.2f} (healthy: 1)")
    say(f"look at {cfg.folder}/grid.png")
# ------------------------------------------------------------------------------------------------
# A. Drawn lesions
# Images to begin with, without a download. (They are cached: after a change here clear runs/cache.)

LESIONS = {             # colours, how ragged and soft the border is, pigment net (pale below 0)
    "keratosis-like": ("b89970 997a57 ccb894 8c7866", .09, .08, .05),
    "melanoma-like": ("42261c 734a33 545c78 8c4545", .20, .12, .20),
    "nevus-like": ("854f38 9e6647 613829 ad6b57", .04, .17, .24),
    "vascular-like": ("a81f2e 851433 c23d42 661f47", .04, .08, -.22)}
SKIN = "edbda8 e69e99 ccadb2 e8c294 d699a3"

def synthetic(i, size, seed=0):
    """Draw image i of the endless set that seed defines: uint8 (3,size,size)."""
    tape = rng(seed, "lesion", i)
    colours, ragged, soft, network = list(LESIONS.values())[i % len(LESIONS)]
    def span(lo, hi, *shape):                       # the next random numbers, uniform in lo…hi
        return lo + (hi - lo) * torch.rand(shape, generator=tape)
    def noise(cells, channels=1):       # a grid of random numbers in about -1…1, smoothly enlarged
        coarse = span(-1, 1, 1, channels, cells, cells)
        return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0]
    def mixture(colours, logits):                   # logits (n,H,W) of n colours -> (3,H,W)
        rgb = torch.tensor(list(bytes.fromhex(colours))).view(-1, 3) / 255              # (n,3)
        rgb += span(-.05, .05, len(rgb), 1)             # each a little lighter or darker
        return torch.einsum("nhw,nc->chw", logits.softmax(0), rgb)

    # A plane that is a little bent: nothing in it is quite straight or round.
    axis = torch.linspace(-1, 1, size)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))        # (2,H,W)
    x, y = plane + .15 * noise(4, 2) + .03 * noise(10, 2)                 # (H,W) each

    # Skin: five tones mixed by random weights and clouds. Softmax lets one win. Then a grain.
    skin = mixture(SKIN, span(0, 6, 5, 1, 1) + noise(3, 5)) + .03 * noise(24)

    # The body has patches of its class's four colours, sharper where the border is more ragged.
    body = mixture(colours, (3 + 40 * ragged) * noise(4, 4)) + .05 * noise(16)

    # The pigment network: walls where the two nearest of 40 points are about equally far away.
    points = span(-.8, .8, 2, 40, 1, 1)
    distance = torch.hypot(x - points[0], y - points[1])                  # (40,H,W)
    first, second = distance.topk(2, dim=0, largest=False).values         # (H,W) each
    wall = torch.exp(-((second - first) / (2.4 / size + .03)) ** 2)       # (H,W), 1 on it
    body = body * (1 - network * wall)

    # The border is a circle, more or less ragged.
    radius = span(.30, .56) + 2 * ragged * noise(6)[0]
    inside = torch.sigmoid(5 / soft * (radius - torch.hypot(x, y)))       # (H,W), 1 inside
    image = torch.lerp(skin, body, inside * span(.85, 1))       # skin + weight · (body - skin)

    # Hairs on 3 of 10 images: dark lines, each with a direction, a place, a width.
    hairs = int(span(1, 6)) if span(0, 1) < .3 else 0
    for _ in range(hairs):
        turn = span(0, 6.3)
        across = y * turn.cos() - x * turn.sin() + span(-.8, .8)
        hair = torch.sigmoid((span(.006, .014) - across.abs()) * size)      # 1 on the line
        image = image * (1 - span(.6, .9) * hair)
    return torch.round(255 * image.clamp(0, 1)).byte()
# ------------------------------------------------------------------------------------------------
# B. A folder of images
# One bad image can end a run after hours, and decoding JPEGs would take most of a laptop's time. So
# each image is opened once, before training, and its pixels are written into one file.

SUFFIX = r"(?i)\.(bmp|gif|jfif|jpe?g|png|tiff?|webp)$"      # images. NO_PHOTO: masks, our pictures
NO_PHOTO = (r"(?i)(_seg|_superpixels|_expert|-partial)[^/]*$|[_-]mask\.\w+$|(^|/)(masks|runs)/"
            r"|(^|/)(grid|trajectory|curves|evaluate|data_preview|\w+_epoch_[\d.]+)\.png$")
HELD_OUT = r"(?i)(?<![^/])(val(id(ation)?)?|test(ing)?)/"   # (?<![^/]): at the start or after a /
# Folders that are no class are cut out of a path: nevus/train/1.jpg is of class nevus.
NO_CLASS = HELD_OUT + r"|(?<![^/])(train(ing)?|(HAM10000_)?images(_part_\d)?)/"
# Columns of tables, in lower case. In each row, the first one that is not empty counts.
ID = "isic_id", "image_id", "image_name", "image"
CLASS = "diagnosis_3", "diagnosis_1", "dx", "diagnosis", "class", "label", "target"
ONE_HOT = "mel", "nv", "bcc", "ak", "akiec", "bkl", "df", "vasc", "scc"     # a 1 marks the class
Image.MAX_IMAGE_PIXELS = 50_000_000     # PIL refuses images of more than twice that

def read_image(file, size):                             # -> uint8 (3,size,size)
    # PIL ignores the suffix. It would open 40 kinds of files, and start Ghostscript for one kind.
    with Image.open(file, formats=["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]) as im:
        im.draft("RGB", (size, size))           # JPEG at 1/2, 1/4 or 1/8 of its size, much faster
        demand(im.mode != "F", "pixels are floats: save them in 8 or 16 bits")
        im = ImageOps.exif_transpose(im)        # cameras store "turn me" beside the pixels
        if im.mode[0] == "I":                   # 16 bits, which PIL would clip at 255, to white
            im = Image.fromarray((np.asarray(im) // 257).astype(np.uint8))      # 65535 = 255·257
        # The middle square, scaled, on white. What a transparent part hides is often junk.
        im = ImageOps.fit(im.convert("RGBA"), (size, size))
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return torch.from_numpy(np.array(im.convert("RGB"))).permute(2, 0, 1)

def stem_of(name):                      # a/ISIC_1.JPG, ISIC_1 and isic_1 name one image
    return re.sub(SUFFIX, "", name.strip().split("/")[-1]).lower()
def first(row, columns):                # the first of these columns that is filled
    return next((row[name] for name in columns if row.get(name)), "")

def read_tables(folder, stems):
    """What tables in a folder or beside it say of its images -> {stem: {column: word}}."""
    found = {}
    for path in sorted([*folder.parent.glob("*.csv"), *folder.glob("*.csv")]):
        with suppress(csv.Error, OSError), path.open(encoding="utf-8-sig", errors="replace") as f:
            known, head = 0, f.readline().lower()
            comma = max(",;\t", key=head.count)
            columns = [name.strip(' "') for name in head.strip().split(comma)]
            is_ours = set(columns) & set(ID)            # else its lines need not be read
            for row in csv.DictReader(f, columns, delimiter=comma) if is_ours else ():
                stem = stem_of(first(row, ID))
                if stem in stems:
                    known += 1
                    filled = {name: word for name, word in row.items() if word}
                    found.setdefault(stem, {}).update(filled)       # tables add to each other
            say("table" if known else "WARNING table", path.name, "names", known, "images", columns)
    return found

def find_images(folder):
    """-> name, class, draw and stamp of each photograph under a folder. The class is the innermost
    folder's name (NO_CLASS cut out), or else what a table says. draw is a number whose last digit
    is 0 for a held-out image. With folders val or test, draw is 0 in them and 1 elsewhere. Without
    them it is a hash of the patient, or of the lesion if no patient is known, or else of the
    image's own name. stamp changes when the file does.
    trap: in a split by photograph, the network is measured on lesions seen in other photographs."""
    names = []
    for name in sorted(glob.glob("**", root_dir=folder, recursive=True)):       # follows links
        name = Path(name).as_posix()            # skips what is hidden
        if re.search(SUFFIX, name) and not re.search(NO_PHOTO, name) and (folder / name).is_file():
            names.append(name)
    table = read_tables(folder, set(map(stem_of, names)))
    licences = Counter(row.get("copyright_license") for row in table.values())
    if set(licences) - {None}:
        say("licences:", *licences.items())
    patient_of = {}                             # lesion -> patient, from any row that names both
    for row in table.values():
        if row.get("lesion_id") and row.get("patient_id"):
            patient_of[row["lesion_id"]] = row["patient_id"]
    by_folder = any(re.search(HELD_OUT, name) for name in names)
    found = []
    for name in names:
        row = table.get(stem_of(name), {})
        ones = [column for column in ONE_HOT if row.get(column) in ("1", "1.0")]
        told = first(row, CLASS) or "".join(ones) or "images"
        kind = Path(re.sub(NO_CLASS, "", name)).parent.name or told
        kind = kind.encode(errors="replace").decode()       # unreadable letters become ?
        lesion = row.get("lesion_id")
        draw = digest(patient_of.get(lesion) or row.get("patient_id") or lesion or name)
        if by_folder:
            draw = 0 if re.search(HELD_OUT, name) else 1
        stat = (folder / name).stat()                       # of what a link points to
        found.append((name, kind, draw, (stat.st_mtime_ns, stat.st_size)))
    return found

def prepare_images(source, cfg, cache):
    """-> pixels, uint8 (n,3,size,size), and the name, class, draw and mark of each image. A mark is
    a checksum of the file, or of drawn pixels. What is drawn or decoded is kept in cache."""
    folder = Path(source)
    if source == "synthetic":
        kinds = list(LESIONS) * cfg.n_images    # in turn; a tenth of each has a draw ending in 0
        found = [(i, kinds[i], i // 4, cfg.seed) for i in range(cfg.n_images)]
        def read(i):
            image = synthetic(i, cfg.size, cfg.seed)
            return image, zlib.crc32(image.numpy())
    else:
        found = find_images(folder)
        def read(name):
            data = (folder / name).read_bytes()
            return read_image(io.BytesIO(data), cfg.size), zlib.crc32(data)
    demand(found, f"--data {source}: no images there; name another folder, or put a link there")
    path = cache / f"{folder.name}-{cfg.size}-{digest((folder, found)):x}.pt"
    with suppress(Exception):                   # not there yet, or damaged
        pixels, entries = torch.load(path, mmap=True)       # pixels stay on disk until needed
        return pixels, entries

    pixels = torch.empty(len(found), 3, cfg.size, cfg.size, dtype=torch.uint8)
    good, bad = [], []
    for name, kind, draw, _ in bar(found, "preparing images"):
        try:
            pixels[len(good)], mark = read(name)
            good.append((name, kind, draw, mark))
        except Exception as e:                  # PIL raises nearly anything on a broken file
            bad.append((name, repr(e)))
    if bad:
        say("skipped", len(bad), "images that cannot be read:", *sorted(bad)[:5])
    demand(len(bad) <= 0.2 * len(found), "--data: that is more than a fifth of all images")
    write_whole(path, lambda f: torch.save((pixels, good), f))
    return pixels, good
# ------------------------------------------------------------------------------------------------
# C. Keeping a run
# A night of training can be lost in three ways: a checkpoint half written when the power failed, a
# resume that restores the weights but not the rest, and settings that silently differ. What a
# checkpoint holds:
#   kind, config, code    the stage, all its settings, a checksum of this file
#   model, disc, ema, guide, adam, muon, adam_d       weights, and the state of optimisers
#   step, seconds, log    how far the run is, and what it reported
#   seen                  the marks of all images that it trained on
#   scale, classes, class_counts, vq      in stage 2, what sampling needs
# What makes a resume exact (on one machine, with --epochs)? All of these are restored, and the rest
# follows. Random numbers and the order of the images follow from seed and step (rng), learning
# rates from step and progress, the split from names, tables and seen.

def write_whole(path, write):           # all or nothing: write beside it, flush, rename
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{rank()}.tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

@contextmanager
def reading(what):                                      # any error in here becomes one sentence
    try:
        yield
    except Exception as e:
        raise UserError(f"{what}: cannot be loaded by this version ({e!r:.100})") from None

def load_checkpoint(where, name, *kinds):
    """A checkpoint, or last.pt of a run folder -> its dict. name is the flag to blame.
    trap: weights_only=False, the default before torch 2.6, runs any code in the file."""
    path = Path(where).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    demand(path.is_file(), f"{name} {where}: no checkpoint is there")
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["kind"], state["seen"]                # fails if it is none of ours
    demand(state["kind"] in kinds, f"{name} {where}: belongs to the other stage")
    return {**state, "folder": path.parent}

def code_checksum():
    return zlib.crc32(Path(__file__).read_bytes())

def open_run(cfg, typed, resume, overwrite):
    """-> a run's settings, the checkpoint to go on from or None. typed: what the user gave."""
    last = cfg.folder / "last.pt"
    if not resume and not last.exists():
        return cfg, None
    demand(resume or overwrite, f"--out {cfg.folder}: holds a run; --resume or --overwrite it")
    state = load_checkpoint(last, "--resume" if resume else "--overwrite", cfg.kind)
    if overwrite:
        say("WARNING pictures and metrics.json of the old run stay in", cfg.folder)
        return cfg, None
    with reading(last):
        old = type(cfg)(**state["config"])
    differ = [f"{flag(name)} was {getattr(old, name)}" for name, value in typed.items()
              if name not in MAY_CHANGE and value != getattr(old, name)]
    demand(not differ, f"--resume goes on with the recorded settings: {differ}")
    if state["code"] != code_checksum():
        say("WARNING the run began with another version of this file: losses may not be comparable")
    if "epochs" in typed:               # beats recorded --minutes. In a longer run, progress
        old = replace(old, minutes=0.0)         # falls back and learning rates rise again
    typed["out"] = cfg.out                              # where it is now, since it may have moved
    return replace(old, **typed), state

def open_model(cls, typed):
    """-> the settings of sample or evaluate, the checkpoint. How images are made belongs to the
    model, so what is not typed comes from the checkpoint."""
    state = load_checkpoint(cls(**typed).ckpt, "--ckpt", *cls.reads)
    recorded = {}
    if state["kind"] == "ldm":
        with reading("--ckpt"):
            recorded = {f.name: state["config"][f.name] for f in fields(Sampling)}
    return cls(**{**recorded, **typed}), state

class Run:
    """A training run. It yields steps, logs and saves, until --epochs, --minutes or a signal ends
    it. parts are networks and optimisers, facts what else sampling needs, state a checkpoint to go
    on from. step counts the steps begun, status is 128 + the signal that ended the run, or 0."""
    def __init__(self, cfg, images, parts, facts, state):
        self.n = len(images.train)
        demand(self.n, "--data: no images to train on, all are held out")
        demand(cfg.batch_size % world() == 0, "--batch-size: not a multiple of the process count")
        self.cfg, self.parts = cfg, parts
        self.facts = {**facts, "seen": images.seen, "code": code_checksum()}
        self.step = self.bad = self.status = 0          # bad: skipped steps in a row
        self.log = []
        self.began = time.perf_counter()
        if state:
            with reading("last.pt"):
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.step, self.log = state["step"], state["log"]
                self.began -= state["seconds"]
        self.steps_per_epoch = self.n / cfg.batch_size
        self.steps = math.ceil(cfg.epochs * self.n / cfg.batch_size)
        self.looks = self.looks_due()           # a resumed run repeats none
        weights = len(parameters_to_vector(parts["model"].parameters()))
        say(f"{weights:,} weights, {self.n} images to train on, from step {self.step}")
    def seconds(self):
        return time.perf_counter() - self.began
    def fraction_done(self):            # by this process, while progress is the mean of all
        if self.cfg.minutes:
            return self.seconds() / 60 / self.cfg.minutes
        return self.step / self.steps
    def looks_due(self):                                # tenths done + spans of ten minutes passed
        return int(10 * self.fraction_done()) + self.seconds() // 600
    def picture(self, name):                            # where to draw what is seen at this look
        epoch = self.step / self.steps_per_epoch
        return self.cfg.folder / f"{name}_epoch_{epoch:06.2f}.png"

    def __iter__(self):
        # Ctrl-C and SIGTERM only ask to finish the step and save. A second Ctrl-C ends at once.
        def ask(number, frame):
            self.status = 128 + number
            signal(SIGINT, SIG_DFL)             # not SIGTERM, of which torchrun may send several
        signal(SIGINT, ask)
        signal(SIGTERM, ask)
        if not self.log:                        # new; if it cannot be saved, fail before the work
            self.save()
        left = None if self.cfg.minutes else self.steps - self.step
        with bar(None, "training", left) as self.line:
            while self.goes_on():
                self.step += 1
                yield self.step - 1             # steps are numbered from 0
                self.line.update()
    def goes_on(self):
        # A signal in one process adds 130 or more, so the mean of up to 130 processes reaches 1.
        done = torch.tensor(self.fraction_done() + self.status, dtype=torch.float64)
        self.progress = float(mean_over_processes(done))
        return self.progress < 1
    def begin_look(self):                               # -> is it time to look?
        before = self.looks
        self.looks = self.looks_due()
        return self.looks > before and rank() == 0
    def skip_step(self, moved):                         # -> must this step be skipped?
        self.bad = 0 if moved else self.bad + 1
        if self.bad:
            say("WARNING step", self.step, "is skipped: its gradient is not finite")
        demand(self.bad < 5, "five such steps in a row: start anew with a lower --lr")
        return self.bad > 0
    def report(self, losses):                           # every tenth step
        if self.step % 10 == 0:
            row = {name: float(mean_over_processes(value.detach()))
                   for name, value in losses.items()}
            self.log.append({"step": self.step, **row})
            self.line.set_postfix(row)
    def end_look(self, held):                           # log, tell and save what was measured
        row = {f"held_{name}": value for name, value in held.items()}
        self.log.append({"step": self.step, **row})
        words = [f"{name} {value:.4g}" for name, value in held.items()]
        say(f"{min(1, self.fraction_done()):4.0%} held out:", *words)
        if held.get("codes_used_percent", 100) < 25:
            say("WARNING few codes are used: normal early, or on few images")
        if not 0.7 < held.get("latent_std", 1) < 1.4:
            say("WARNING the latents' std is far from 1: normal early only")
        self.save()
    def checkpoint(self):                               # all that resuming and sampling need
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return {**state, **self.facts, "kind": self.cfg.kind, "config": asdict(self.cfg),
                "step": self.step, "seconds": self.seconds(), "log": self.log}
    def save(self):                                     # last.pt, log.csv, curves.png
        if rank():                                      # only the first process saves
            return
        write_whole(self.cfg.folder / "last.pt", lambda f: torch.save(self.checkpoint(), f))
        names = list(dict.fromkeys(name for row in self.log for name in row))   # each once
        with suppress(PermissionError):         # Excel locks a table that it shows
            with open(self.cfg.folder / "log.csv", "w", newline="") as f:
                table = csv.DictWriter(f, names)
                table.writeheader()
                table.writerows(self.log)
        draw_curves(self.cfg.folder / "curves.png", self.log)
    def finish(self, then):                             # -> exit status
        self.save()
        mean_over_processes(torch.zeros(1))             # a barrier: all wait for that save
        then = "to go on, add --resume; it is in" if self.status else then
        say("saved at step", self.step, "--", then, shlex.quote(self.cfg.folder.as_posix()))
        return self.status
# ------------------------------------------------------------------------------------------------
# D. Pictures

@contextmanager
def figure(path, width, rows, columns=1):               # with figure(…) as axes, draw on them
    from matplotlib.figure import Figure                # not pyplot, which needs a window
    fig = Figure(figsize=(width, 1.3 * rows * columns), layout="constrained")
    yield fig.subplots(rows, columns, squeeze=False).flatten()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # about letters that no font here has
        write_whole(path, lambda f: fig.savefig(f, format="png"))

def draw_rows(path, rows):
    """A strip for each label of rows, {label: uint8 images}. At most 16 strips of 16 images."""
    rows = dict(list(rows.items())[:16])
    columns = min(16, max(map(len, rows.values())))
    with figure(path, columns, len(rows)) as axes:
        for ax, (label, images) in zip(axes, rows.items()):
            strip = make_grid(images[:16], columns, pad_value=255)
            ax.imshow(strip.permute(1, 2, 0).numpy())
            ax.set_anchor("W")                  # a shorter strip begins at the left, too
            ax.set_title(label, fontsize=9, loc="left", parse_math=False)
            ax.axis("off")

def draw_preview(path, images):                         # 16 training images of each class
    label = images.labels[images.train]
    rows = {}
    for c in label.unique()[:16]:
        rows[images.classes[c]] = images.rows(images.train[label == c][:16])
    draw_rows(path, rows)

# Which curves share a panel of curves.png, in either stage. Other numbers are only in log.csv.
PANELS = ("mse held_mse", "lpips held_lpips", "codebook d_loss", "d_real d_fake", "lam",
          "held_perplexity", "loss held_loss", "held_latent_std")

def draw_curves(path, log):
    known = {name for row in log for name in row}
    panels = [names for names in map(str.split, PANELS) if known.intersection(names)]
    if not panels:
        return
    with figure(path, 8, (len(panels) + 1) // 2, 2) as axes:
        for ax, names in zip(axes, panels):
            for name in names:
                rows = [row for row in log if name in row]
                ax.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
            losses = names[-1] not in ("d_fake", "held_perplexity", "held_latent_std")
            ax.set_yscale("log" if losses else "linear")
            ax.legend(fontsize=7)
# ------------------------------------------------------------------------------------------------
# E. Measuring
# A kernel distance only means something beside its references (see evaluate), and over several
# seeds: on photographs, five runs of one command were up to 5 apart. Its features are LPIPS's, a
# loss of stage 1, so both flatter models that were trained with it.

def compare(x_hat, x, lpips):                           # (B,3,H,W) in [-1,1], twice
    """-> {name: (B,)}. A new measure needs one line here, and is logged at each look, too."""
    mse = F.mse_loss(x_hat, x, reduction="none").mean((1, 2, 3))
    numbers = {"mse": mse, "psnr": 10 * torch.log10(4 / mse.clamp(min=1e-10))}  # dB: range²/error
    if lpips:
        numbers["lpips"] = lpips(x_hat, x).flatten()
    return numbers

@torch.no_grad()
def reconstruct(vqgan, images, lpips, mixed):
    """uint8 (n,3,H,W) -> numbers by name, reconstructions."""
    e = vqgan.codebook.embedding.weight
    numbers, grids, copies = Counter(), [], []
    for part in images.split(16):
        x = to_float(part).to(e.device)
        with mixed:
            k = vqgan.encode(x)                                           # (B,h,w)
            x_hat = vqgan.decode(k).clamp(-1, 1)
        for name, value in compare(x_hat, x, lpips).items():
            numbers[name] += float(value.sum()) / len(images)
        grids.append(k.cpu())
        copies.append(to_bytes(x_hat))
    p = frequencies(torch.cat(grids), len(e))                             # (K,)
    entropy = -torch.xlogy(p, p).sum()
    numbers["codes_used_percent"] = 100 * int((p > 0).sum()) / len(p)
    numbers["perplexity"] = float(entropy.exp())                          # 1 … K
    return dict(numbers), torch.cat(copies)

def features(lpips, images):
    """uint8 (n,3,H,W) -> (n,512), the mean over places of the last map of LPIPS's network."""
    found = []
    for part in images.split(32):
        x = to_float(part).to(lpips.scaling_layer.shift.device)
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        last = lpips.net(lpips.scaling_layer(x))[-1]        # of the maps of all layers
        found.append(last.mean((2, 3)))
    return torch.cat(found).cpu().double()

def kernel_distance(a, b):
    """How far apart two sets of features (n,512) lie, 0 on average if they are of one kind. A
    kernel, (u·v/512 + 1)³, says how alike two features are. The distance is its mean over pairs
    within a, plus that within b, minus twice that across: a squared MMD (KID, arXiv 1801.01401)."""
    def kernel(u, v):                                                     # (n,n)
        return (u @ v.T / u.shape[1] + 1) ** 3
    pairs = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    # Without the diagonal: no image is paired with itself, nor a[i] with b[i], maybe its copy.
    return float((pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1)))

def near_copies(samples, unseen, known):
    """Percent of samples nearer to a training image than 99 % of unseen images are. By chance it is
    1. known: the training images, in parts. Networks can memorise small sets (arXiv 2402.01054)."""
    def shrink(images):
        return F.interpolate(to_float(images), (32, 32), mode="area").flatten(1)
    trained = torch.cat([shrink(part) for part in known])
    def distance(images):                               # to the nearest training image, (n,)
        return torch.cdist(shrink(images), trained).amin(1)
    near = distance(samples) < distance(unseen).quantile(0.01)
    return 100 * float(near.float().mean())

def evaluate(cfg, state):                               # -> metrics.json, evaluate.png
    folder = cfg.folder if cfg.out else state["folder"]
    new = Path(cfg.images).expanduser()
    demand(not cfg.images or not new.exists(), f"--images {new}: exists; name a new folder")
    device, mixed = pick_device(cfg)
    lpips = load_lpips("auto", device)
    vqgan, vq_cfg = load_vqgan(state.get("vq", state), device)
    images = Images(cfg.data or vq_cfg.data, vq_cfg, folder.parent / "cache")
    seen = torch.isin(images.marks, state["seen"])
    unseen = (~seen).nonzero().flatten()
    unseen = unseen[torch.randperm(len(unseen), generator=rng(cfg.seed, "unseen"))]
    say(int(seen.sum()), "of these images were trained on and are left out")
    n = min(cfg.n, len(unseen) // 2)
    demand(n > 1, "--n, --data: too few unseen images to measure on")
    real, other = images.rows(unseen[:2 * n]).split(n)
    numbers, recon = reconstruct(vqgan, real, lpips, mixed)
    pictures = {"real": real, "recon": recon}
    if state["kind"] == "ldm":
        model = LatentDiffusion(state, device, mixed)
        # Classes in the proportion that training saw.
        label = model.class_counts.multinomial(n, True, generator=rng(cfg.seed, "classes"))
        made, z0 = model.images(cfg, range(n), label)
        pictures["samples"] = made
        numbers["latent_std"] = float(z0.std())
        if lpips:
            # Each set is compared with real. kernel_perfect is what a better stage 2 approaches:
            # other unseen images, with stage 1's errors alone. (kernel_recon repeats real.)
            perfect = reconstruct(vqgan, other, None, mixed)[1]
            sets = {"kernel": made, "kernel_perfect": perfect, "kernel_recon": recon,
                    "kernel_real": other}                   # no model, so chance alone
            a = features(lpips, real)
            for name, images_of in sets.items():
                numbers[name] = kernel_distance(a, features(lpips, images_of))
        if seen.any():
            known = map(images.rows, seen.nonzero().flatten().split(256))
            numbers["near_copies_percent"] = near_copies(made, torch.cat([real, other]), known)
    numbers["n"] = n
    for name, value in numbers.items():
        say(f"{name:20}{value:10.4g}")
    draw_rows(folder / "evaluate.png", pictures)
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=1))
    if cfg.images:
        for name, made in pictures.items():
            (new / name).mkdir(parents=True)
            for i, image in enumerate(made):
                write_png(image, f"{new}/{name}/{i:05d}.png")
# ------------------------------------------------------------------------------------------------
# F. Muon
# Every matrix is a sum of directions u vᵀ, each with a strength s (its singular value
# decomposition). In a kernel's gradient, read as a matrix (first axis, rest), a few directions far
# outweigh the others. Adam evens out entries, not directions, so the weak ones hardly learn. Muon
# evens out the strengths of directions (kellerjordan.github.io/posts/muon).

def orthogonal(g):
    """g (r,n) = U S Vᵀ -> nearly U Vᵀ. All strengths but the tiniest become 0.7 to 1.2.
    Newton-Schulz does this without an SVD. Since x xᵀ x = U S³ Vᵀ, sums of odd powers change S
    alone. Each round takes every s to 3.4445 s - 4.775 s³ + 2.0315 s⁵, so most end near 1."""
    x = g / (g.norm() + 1e-7)                   # the norm is √ of the sum of all s², so s ≤ 1
    for _ in range(5):
        gram = x @ x.T                                                    # (r,r)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x

class Muon(torch.optim.Optimizer):
    """Jordan's rule for kernels. A step is lr · orthogonal(running mean of the gradient)."""
    def __init__(self, kernels, lr):
        super().__init__([{"params": kernels}], {"lr": lr})
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.05)
                # Nesterov's look ahead: the newest gradient goes in a second time.
                g = p.grad.lerp(mean, 0.95).flatten(1)
                p.sub_(group["lr"] * orthogonal(g).view_as(p))
# ------------------------------------------------------------------------------------------------
# G. Commands

COMMANDS = {"train-vq": (VQConfig, train_vq), "train-ldm": (LDMConfig, train_ldm),
            "sample": (SampleConfig, sample), "evaluate": (EvaluateConfig, evaluate)}

class Parser(argparse.ArgumentParser):
    def error(self, message):                           # one sentence instead of a page of usage
        raise UserError(message)

def flag(name):                                         # class_ -> --class
    return "--" + name.strip("_").replace("_", "-")

def build_parser(command, cls):
    """Each field of the command's settings becomes a flag. The comment on its line is its help."""
    parser = Parser(prog=f"vqldm.py {command}", description=cls.__doc__, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)       # what is not typed has no value
    text = "".join(getsource(base) for base in cls.__mro__[:-1])
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)", text, re.MULTILINE))
    as_trained = fields(Sampling) if not command.startswith("train") else ()
    followed = {f.name for f in as_trained}
    for f in fields(cls):
        default = "as trained" if f.name in followed else f.default
        words = f"{comments[f.name]} [{default}]"
        how = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag(f.name), dest=f.name, help=words, **how)
    if command.startswith("train"):
        mode = parser.add_mutually_exclusive_group()
        mode.add_argument("--resume", action="store_true", help="go on with the run in --out")
        mode.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return parser

def run_command(argv):                                  # -> exit status; None is 0
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        say(__doc__, "\nCOMMAND --help lists that command's settings")
        return
    demand(command in COMMANDS, f"{command}: is no command; choose one of {list(COMMANDS)}")
    cls, function = COMMANDS[command]
    parser = build_parser(command, cls)
    typed = vars(parser.parse_args(rest))
    resume = typed.pop("resume", False)
    overwrite = typed.pop("overwrite", False)
    preset = typed.get("preset", "default")
    demand(preset in PRESETS, f"--preset: must be one of {list(PRESETS)}")
    words = PRESETS[preset].get(command, "").split()
    given = {**vars(parser.parse_args(words)), **typed}         # what was typed beats the preset
    if command.startswith("train"):
        return function(*open_run(cls(**given), typed, resume, overwrite))
    return function(*open_model(cls, typed))

def main(argv):
    """Run one command. SystemExit is 2 for a mistake or a full disk, 130 or 143 for a signal."""
    if dist.is_torchelastic_launched():                 # by torchrun; gloo for CPUs, nccl for GPUs
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with suppress(AttributeError):                      # a notebook's stdout cannot do this
        # For consoles that lack é, and so that lines sent to a file appear at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    status = 2
    try:
        status = run_command(argv)
    except UserError as e:
        print("vqldm:", e, file=sys.stderr)
    except KeyboardInterrupt:               # while preparing or sampling
        status = 130
    except (MemoryError, OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__ or e     # torch wraps disk errors
        if re.search("out of memory|allocate|MemoryError", repr(e)):
            cause = "out of memory: a smaller --batch-size (or stage 1's --size) helps"
        elif not isinstance(cause, OSError):
            raise
        print("vqldm:", cause, file=sys.stderr)
    finally:
        signal(SIGINT, default_int_handler)     # as before training, for notebooks
        signal(SIGTERM, SIG_DFL)
    if status:
        raise SystemExit(status)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main(sys.argv[1:])
