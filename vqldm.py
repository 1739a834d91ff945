# SPDX-License-Identifier: MIT
"""vqldm: VQGAN + latent diffusion in one file, from pixels to new images.

Stage 1, the VQGAN (vector quantised GAN), learns to write an image as a small grid of code numbers
and to read it back. Stage 2, latent diffusion, learns to turn noise into new grids, which stage 1
turns into images. Grids are small, so all of this fits on a laptop. The images are skin lesions
that the program draws, or a folder of yours, such as photographs of the ISIC archive.

  x ───Enc───► z ───nearest code───► z_q ───Dec───► x_hat       stage 1: VQGAN        (train-vq)
  (B,3,H,W)    (B,d,h,w)  │          (B,d,h,w)      (B,3,H,W)
                          └► k (B,h,w) in 0…K-1                 h = H/f, w = W/f
  k → z_q → z0 = (z_q-mean)/std ──noise──► z_t ──UNet──► v      stage 2: diffusion    (train-ldm)
  noise ──UNet, S steps──► z0 ──·std+mean──► nearest code ──Dec──► image              (sample)

Letters   B batch · C channels · H W pixels · h w latent grid · K codes, vectors of length d
          N = h·w cells · m halvings of the grid, so f = 2^m · T noise levels · S sampling steps
          E length of emb, the vector that tells a block the noise level and the class
          x image in [-1,1] · z latent · z_q its code · k the code's number · z0 standardised z_q
          (DDPM's x_0) · z_t noisy z0, level t in 0…T-1 · eps the noise ε · v: section 8
          abar ᾱ, z0's share of z_t's variance · lam λ, it scales the GAN's loss · a hat: estimated
Papers    VQ van den Oord 2017 (arXiv 1711.00937) · VQGAN Esser 2021 (2012.09841) · DDPM Ho 2020
          (2006.11239) · DDIM Song 2021 (2010.02502) · LDM Rombach 2022 (2112.10752)
          v Salimans 2022 (2202.00512) · CFG (classifier-free guidance) Ho 2022 (2207.12598)
Contents  1. Settings                       7. Stage 1: training      B. A folder of images
          2. Blocks                         8. Stage 2: diffusion     C. Keeping a run
          3. Stage 1: the VQGAN             9. Stage 2: the UNet      D. Pictures
          4. Stage 1: the losses           10. Stage 2: training      E. Measuring
          5. Device, precision, seeds      11. Sampling               F. Muon
          6. What both trainings share      A. Drawn lesions          G. Commands
Run it    python vqldm.py train-vq, then train-ldm, then sample. evaluate measures the result.
          "trap" marks a frequent mistake, "ours" an idea that none of the named papers has.
"""
import argparse, inspect, re, shlex
import csv, hashlib, io, json
import os, sys, time, warnings
import copy, math, random
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import cycle, pairwise
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, default_int_handler, signal
from typing import Literal, get_args
# Lets a Mac's GPU leave what it lacks to the CPU. torch reads this when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torchvision.io import encode_png
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

# ---- 1. Settings ------------------------------------------------------------------------------
# A setting is one line: name, type, default, and its --help as a comment. Why: .github/NOTES.md.

class UserError(argparse.ArgumentTypeError):
    """A mistake that only the user can mend, reported in one sentence with exit status 2."""

def demand(ok, text):
    if not ok:
        raise UserError(text)

# A setting's type is a function that reads the typed word. bool is a switch, Literal a choice.
def whole(text):
    demand(text.strip().isdecimal() and int(text) >= 1, "only whole numbers from 1 on will do")
    return int(text)

def wholes(text):               # "16,64" -> (16, 64)
    return tuple(map(whole, text.split(",")))

def within(low, high):
    """-> a type that reads a number from low to high"""
    def number(text):
        demand(low <= float(text) <= high, f"must be from {low:g} to {high:g}")
        return float(text)
    return number
amount = within(0, 1e30)

def source(text):                       # a folder is recorded with its full path
    demand(text, "is empty")
    return text if text == "synthetic" else os.path.abspath(os.path.expanduser(text))

@dataclass(frozen=True)
class Settings:
    seed: int = 0                       # of all random choices but held-out images' order and noise
    device: str = "auto"                # auto, or a device of torch, such as cpu or cuda:1
    out: str = ""                       # empty: runs/vq, runs/ldm, runs/samples. evaluate: --ckpt's
    @property
    def folder(self):                   # stage is set below, in the commands' classes
        return Path(os.path.expanduser(self.out or f"runs/{self.stage}"))

@dataclass(frozen=True)
class Training(Settings):
    preset: Literal["default", "tiny", "report"] = "default"    # tiny is a trial. See PRESETS
    upsample: Literal["nearest", "transposed"] = "nearest"  # how grids are doubled (section 2)
    lr: amount = 1e-3                   # learning rate of everything that has none of its own
    resume: bool = False                # go on with the run in --out

@dataclass(frozen=True)
class Sampling:
    """How images are made. sample and evaluate take what you do not type from train-ldm."""
    sampler: Literal["ddim", "ddpm"] = "ddim"   # ddpm needs many more steps
    steps: whole = 50                   # S, steps from noise to image. More than T only take time
    guidance: amount = 1.5              # strength away from the UNet's errors (section 11). 1: none
    class_guidance: amount = 1.5        # strength towards the class (section 11). 1: none

# ---- 2. Blocks --------------------------------------------------------------------------------
# The VQGAN and the UNet are built from these. emb and skip are only the UNet's (section 9).

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

def Norm(c):
    """GroupNorm with one group, where DDPM has 32, brings all C·H·W numbers of an image to mean 0
    and std 1. Then it scales and shifts each channel as learned."""
    return nn.GroupNorm(1, c)

def zero(layer):
    """A zeroed layer adds nothing at first. So a block starts as its shortcut. Yet it learns: for
    y = W x, the gradient of W is that of y times x. (emb's follow when conv2 is not zero.)"""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class AttentionBlock(nn.Module):
    """Every cell sees all others, not only its neighbours. Linear maps give each a query, a key and
    a value. A cell's output is the mean of all values, weighted by how well their keys fit its
    query, softmax(query·key/√C), Vaswani 2017. This costs (h·w)², so only MidBlock has it."""
    def __init__(self, c):
        super().__init__()
        self.norm = Norm(c)
        self.attention = nn.MultiheadAttention(c, num_heads=1, batch_first=True)
        zero(self.attention.out_proj)

    def forward(self, x):                                                 # (B,C,h,w)
        y = rearrange(self.norm(x), "B C h w -> B (h w) C")               # (B,h·w,C)
        y, _ = self.attention(y, y, y, need_weights=False)                # all three from y
        y = rearrange(y, "B (h w) C -> B C h w", h=x.shape[2])
        return x + y                                                      # (B,C,h,w)

class DownBlock(nn.Module):
    """Two ResBlocks, then a strided convolution halves the grid. Its kernel of 4 reads inner cells
    twice in each direction. One of 3 would read even cells once and odd cells twice."""
    def __init__(self, c_in, c_out, emb_dim=None):
        super().__init__()
        self.res1 = ResBlock(c_in, c_out, emb_dim)
        self.res2 = ResBlock(c_out, c_out, emb_dim)
        self.down = nn.Conv2d(c_out, c_out, 4, stride=2, padding=1)

    def forward(self, x, emb=None):                                       # (B,c_in,H,W)
        skip = self.res2(self.res1(x, emb), emb)                          # (B,c_out,H,W)
        return self.down(skip), skip                # (B,c_out,H/2,W/2), (B,c_out,H,W)

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
    trap: a transposed convolution computes even and odd pixels with different weights, and a
    checkerboard can show (Odena 2016, distill.pub). Copying each cell to 2×2 avoids it."""
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

def channel_pairs(widths):
    """(c_in, c_out) of each DownBlock: (16, 64) -> (16, 16), (16, 64). UpBlocks reverse it."""
    return list(pairwise([widths[0], *widths]))

# ---- 3. Stage 1: the VQGAN --------------------------------------------------------------------
# The encoder makes the grid small, the codebook makes it discrete, and the decoder maps it back.
# Why discrete? In the VQGAN paper, stage 2 predicts code numbers one by one, like the words of
# a text. Here, what stage 2 makes is rounded to vectors that the decoder knows.
# The codebook, K learned vectors, is delicate, since a code that is never chosen never learns.
# Watch the share of codes in use and their perplexity, the exponential of the entropy of code
# frequencies. It is K if all codes are used equally.
# trap: Norm and attention see the whole image. So changing some of its pixels can change codes
# elsewhere, and changing one code changes all pixels.

class Encoder(nn.Module):
    """x -> z: Conv, m DownBlocks, MidBlock, Norm, SiLU, Conv (VQGAN Table 7)."""
    def __init__(self, widths, z_dim):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        channels = channel_pairs(widths)                                  # 16 → 16 → 64
        self.down = nn.ModuleList([DownBlock(c_in, c_out) for c_in, c_out in channels])
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
        for c_out, c_in in reversed(channel_pairs(widths)):               # 64 → 16 → 16
            self.up.append(UpBlock(c_in, c_out, upsample=upsample))
        self.norm = Norm(widths[0])
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q):                                               # (B,d,h,w)
        y = self.mid(self.first(z_q))
        for block in self.up:
            y = block(y)                                                  # the grid doubles m times
        y = F.silu(self.norm(y))
        # In fp32, since section 4 compares two gradients of this layer, and bf16 has few digits.
        with torch.autocast(y.device.type, enabled=False):
            return self.last(y.float())                                   # (B,3,H,W)

class Codebook(nn.Module):
    """Replaces each vector of z by the nearest of K learned ones (VQ sec. 3.1)."""
    def __init__(self, codes, z_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, z_dim)                       # (K,d)
        # How many vectors chose each code, its wins, since unused codes last restarted (see below).
        self.register_buffer("wins", torch.zeros(codes))                  # (K,)

    def nearest(self, z):                                                 # (B,d,h,w)
        """The nearest code's number, k = argmin_j ‖z - e_j‖ with e_j in row j (VQ eq. 1). trap: do
        not rescale z here, say to length 1. Stage 2's samples come through here, too, and
        nearest(lookup(k)) must be k."""
        B, d, h, w = z.shape
        # trap: in bf16 many choices are wrong, as two codes are often almost equally near. So
        # distances are in fp32. All vectors form one list, since a batched cdist would copy the
        # codebook B times.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z.float(), "B d h w -> (B h w) d")           # (B·N,d)
            distance = torch.cdist(flat, self.embedding.weight)           # (B·N,K)
            k = distance.argmin(dim=1)
        return k.view(B, h, w)                                            # (B,h,w)

    def lookup(self, k):                                                  # (B,h,w)
        """z_q = e_k (VQ eq. 2). contiguous() puts channels first in memory, for a Mac's GPU."""
        return rearrange(self.embedding(k), "B h w d -> B d h w").contiguous()        # (B,d,h,w)

    def forward(self, z):                                                 # (B,d,h,w)
        """-> z_q (its gradient goes to z), k, codebook loss, commitment loss (VQ eq. 3)."""
        k = self.nearest(z)                                               # (B,h,w)
        z_q = self.lookup(k)                                              # (B,d,h,w)
        # One distance, two losses. sg[], which is detach(), decides who moves:
        #   codebook_loss   moves codes towards the vectors that chose them     weight 1
        #   commit_loss     moves the encoder's vectors towards their codes     --commit-weight
        # trap: VQGAN's program has these weights swapped: 0.25 on the codebook loss and 1 on the
        # commitment. Both losses have the same value, so no curve gives it away.
        codebook_loss = F.mse_loss(z_q, z.detach())             # mean of (sg[z] - e)²
        commit_loss = F.mse_loss(z, z_q.detach())               # mean of (z - sg[e])²
        # Straight through (VQ sec. 3.2). Rounding has slope 0, so z would get no gradient. Instead
        # it gets the decoder's gradient for z_q, unchanged. That gradient is a lie, but it points
        # downhill while z and z_q are close, as the two losses keep them. The value is still z_q.
        # trap: if codebook_loss came after this line, from the new z_q, no code would ever learn.
        z_q = z + (z_q - z).detach()
        return z_q, k, codebook_loss, commit_loss

    # trap: the usual start, uniform in ±1/K, puts all codes near the origin. If encoder outputs
    # lie elsewhere, a few codes win everything and the rest never learn: codebook collapse. So
    # codes without wins restart (Jukebox, arXiv 2005.00341).
    @torch.no_grad()
    def restart_unused(self, z, generator):                               # (B,d,h,w)
        """Move codes without a win since the last call (at step 0: all) to random vectors of z."""
        unused = self.wins == 0                                           # (K,)
        n = int(unused.sum())
        flat = rearrange(z, "B d h w -> (B h w) d")                       # (B·N,d)
        pick = torch.randint(len(flat), (n,), generator=generator)
        jitter = torch.randn(n, flat.shape[1], generator=generator).to(z.device)
        jitter *= 0.01 * flat.std(0, correction=0)                        # so that no two are alike
        self.embedding.weight[unused] = flat[pick] + jitter
        self.wins.zero_()

    def count_wins(self, k):                                              # (B,h,w)
        """Add up how often each code was chosen. (A mean over processes: only 0 or not matters.)"""
        wins = torch.bincount(k.flatten(), minlength=len(self.wins)).float()
        self.wins += mean_over_processes(wins)

class VQGAN(nn.Module):
    """Encoder, codebook and decoder, for images in [-1,1] whose sides are multiples of f = 2^m."""
    def __init__(self, cfg):            # a VQConfig, section 7
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg.widths, cfg.z_dim)
        self.codebook = Codebook(cfg.codes, cfg.z_dim)
        self.decoder = Decoder(cfg.widths, cfg.z_dim, cfg.upsample)

    def forward(self, x):                                                 # (B,3,H,W)
        """-> x_hat (B,3,H,W), k (B,h,w), codebook loss, commitment loss."""
        z = self.encoder(x).float()
        z_q, k, codebook_loss, commit_loss = self.codebook(z)
        return self.decoder(z_q), k, codebook_loss, commit_loss

    def encode(self, x):                # x (B,3,H,W) -> code numbers k (B,h,w)
        return self.codebook.nearest(self.encoder(x))

    def decode(self, k):                # and back to x_hat (B,3,H,W)
        return self.decoder(self.codebook.lookup(k))

# ---- 4. Stage 1: the losses -------------------------------------------------------------------
# The squared error alone gives blur, since its best answer is the mean of all sharp images
# that fit the code. LPIPS sends both images through a frozen network that classifies
# photographs, and sums weighted differences of their feature maps. Blurred and sharp hair have
# different features. What still betrays a reconstruction is left to a GAN. The discriminator D
# learns to give high numbers (logits) to real images and low ones to reconstructions. The
# VQGAN, here the generator, competes.

def load_lpips(device):
    """LPIPS (Zhang 2018, arXiv 1801.03924) for images in [-1,1], or None if it cannot be loaded.
    It is called outside autocast, so never in bf16, and kept outside the VQGAN's checkpoints."""
    try:
        warnings.filterwarnings("ignore", module="torchvision")     # of lpips's outdated calls
        import lpips
        net = lpips.LPIPS(net="squeeze", verbose=False)     # the smallest of its three networks
        return place(net, device).eval().requires_grad_(False)
    except Exception as e:
        say("WARNING no LPIPS:", e, "- its weights belong in", torch.hub.get_dir() + "/checkpoints")

class PatchDiscriminator(nn.Module):
    """D gives a logit, without a sigmoid, for each place of the latent grid, high where the image
    looks real. Kernels see 18×18 pixels at f = 4, 38 at 8, 78 at 16 (pix2pix: 70)."""
    def __init__(self, widths):
        super().__init__()
        c = max(32, widths[0] // 2)
        layers = [nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in widths[1:]:                                              # f = 4: 3 → 32 → 64 → 1
            layers += [nn.Conv2d(c, 2 * c, 4, stride=2, padding=1), Norm(2 * c), nn.LeakyReLU(0.2)]
            c *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, x):                                                 # (B,3,H,W)
        return self.layers(x).float()                                     # (B,1,h,w)

def hinge_loss(real, fake):
    """D's loss, as in VQGAN's code (eq. 5 has logs). Real logits > 1 and fake < -1 cost nothing."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

def adaptive_weight(rec, adversarial, last, limit):
    """lam = ‖∇_L rec‖ / (‖∇_L adversarial‖ + δ), VQGAN eq. 7. L is the weight of the decoder's
    last layer, so no gradient has to go back through the VQGAN. lam makes the GAN's gradient as
    long as rec's, where the limit allows it, and gan_weight then scales it."""
    def push(loss):
        # -> ‖∇_L loss‖, a constant. No graph leads back to weights, so none learns to change it.
        (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
        return mean_over_processes(gradient).norm()

    lam = push(rec) / (push(adversarial) + 1e-4)        # δ is 1e-6 in the paper, 1e-4 in its code
    # trap: a D that cannot tell real from fake has a tiny, meaningless gradient. VQGAN's code
    # allows a lam of 1e4, which enlarges it: x_hat jumps about, and D is slow to catch up.
    # ours: a low limit. In most steps lam is this constant, and eq. 7 is only a brake, where the
    # adversarial gradient is more than 1/limit times, by default 250 times, as long as rec's.
    return lam.clamp(max=limit)

# ---- 5. Device, precision, seeds --------------------------------------------------------------

def pick_device(cfg):
    """-> the device, and autocast. `with autocast():` computes matrix products and convolutions in
    bf16 where that is supported. It has fp32's range, but only 2 to 3 decimal digits."""
    name = cfg.device
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with blame(f"--device {name}: cannot be used here, --device cpu can"):
        device = torch.ones(1, device=name).device
    bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    say("device", device, "in bf16" if bf16 else "in fp32")
    return device, partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)

def place(net, device):
    """Move a network. Most devices are faster if a pixel's channels are neighbours in memory. A
    Mac's GPU is slower (pytorch issue 193349)."""
    layout = torch.contiguous_format if "mps" in str(device) else torch.channels_last
    return net.to(device, memory_format=layout)

def digest(key):                        # anything printable -> 63 bits, the same in any process
    return random.Random(repr(key)).getrandbits(63)

def rng(*key):
    """The random numbers that belong to a key, such as (seed, "turns", step). They are looked up,
    never carried along, so step 700 draws the same ones in a run that was killed and resumed."""
    return torch.Generator().manual_seed(digest(key))

# torchrun starts this program once for each GPU. There are world() such processes, and this
# one is number rank(). Each takes an equal share of a batch. All make the same random choices
# and average what must agree, such as gradients. Process 0 alone prints and saves the run.
def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def share(batch):                       # this process's rows of a batch
    return batch.chunk(world())[rank()]

def mean_over_processes(x):             # x itself becomes the mean
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x

def say(*words):
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))

def bar(items, name, total=None):       # with disable=None, tqdm draws on a terminal only
    return tqdm(items, name, total, leave=False, disable=True if rank() else None)

# ---- 6. What both trainings share -------------------------------------------------------------

class Images:
    """All images of a run, as squares of one size, split into train and val. Appendix B reads them.
    cache is a folder for pixels, and seen are the checksums of what earlier runs trained on."""
    def __init__(self, source, cfg, cache, seen=()):
        self.pixels, files = read_pixels(source, cfg, cache)              # uint8 (n or more,3,H,W)
        demand(files, f"--data {source}: no images are there, name another folder")
        tables = {} if source == "synthetic" else read_tables(Path(source))
        found = describe(files, tables, cfg.held_out)
        class_names, held, checksums, groups = zip(*found)
        self.classes = sorted(set(class_names))
        self.labels = torch.tensor([self.classes.index(name) for name in class_names])      # (n,)
        # Those of each image's content and of its group: a patient, or a lesion, or itself.
        self.checksums = torch.tensor([checksums, groups]).T                                # (n,2)
        held = torch.tensor(held)                                         # (n,) bool
        self.train = (~held).nonzero().flatten()
        before = torch.as_tensor(seen, dtype=torch.int64)
        self.seen = torch.cat([before, self.checksums[self.train].flatten()]).unique()
        # trap: a held-out image may be a copy of a trained one, or show the same lesion, or
        # have been trained on by an earlier run. In val, all these would reward memorising.
        val = (held & ~self.known(self.seen)).nonzero().flatten()
        self.val = val[torch.randperm(len(val), generator=rng("held out"))]     # classes mixed
        say("data", source, len(found), "images:", self.by_class(self.labels))
        if len(val) < held.sum():
            say("WARNING", int(held.sum()) - len(val), "held-out images are not used,",
                "because their patient, their lesion or a copy is trained on")

    def by_class(self, labels):
        count = labels.bincount(minlength=len(self.classes)).tolist()
        return ", ".join(f"{name} {n}" for name, n in zip(self.classes, count))

    def known(self, checksums):
        """-> (n,) bool: has the image, or another of its group, one of these checksums?"""
        hit = torch.isin(self.checksums, checksums).any(1)
        return torch.isin(self.checksums[:, 1], self.checksums[hit, 1])

def to_float(x):                        # uint8 0…255 -> [-1,1]
    return x.float() / 127.5 - 1

def to_bytes(x):                        # and back, on the CPU. x_hat may lie beyond [-1,1]
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()

def next_rows(n, step, batch_size, seed):
    """Row numbers (B,) of a step: the next of an endless stream that is reshuffled every epoch. If
    n = 10, step 2 of 4 each takes the last two of epoch 0 and the first two of epoch 1."""
    start = step * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    stream = [torch.randperm(n, generator=rng(seed, "order", epoch)) for epoch in epochs]
    return torch.cat(stream)[start % n:][:batch_size]

def lr_factor(step, progress):
    """Factor of all learning rates. It rises for 50 steps. In the last 60 % it falls to 0.01."""
    up = (step + 1) / 50
    down = (1 - progress) / 0.6
    return max(0.01, min(1, up, down))

def descend(loss, net, factor, *optimizers):
    """One step of the optimisers, at factor times their rates. If a gradient is not finite, no
    weight moves, since one bad batch must not end a night's run."""
    net.zero_grad()
    loss.backward()
    for p in net.parameters():
        if p.grad is not None:          # frozen ones have none
            mean_over_processes(p.grad)
    # Clipped to length 1, so that an outlier cannot dominate the optimisers' running averages.
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if not norm.isfinite():
        say("WARNING a gradient is not finite, a step is skipped. If often, start with less --lr")
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = factor * initial
        optimizer.step()

# ---- 7. Stage 1: training ---------------------------------------------------------------------
# In each step the generator learns first, then D learns on the same images. D joins after a
# tenth of the run, since from the first blobs it would learn only that blur is fake.
# Ten looks or more measure up to 256 images, never trained on, and draw 16. If all is well,
# psnr rises and lpips falls to the end. D's lead, d_real - d_fake, is 0.4 to 0.7 on photographs.
# Near 0, as on drawn images, D tells nothing apart. Above 1, it is far ahead. By default:
#     x (8,3,64,64) → z (8,3,16,16) → k (8,16,16) → z_q (8,3,16,16) → x_hat (8,3,64,64)

@dataclass(frozen=True)
class VQConfig(Training):
    """stage 1: train the VQGAN, image -> codes -> image"""
    stage = "vq"                        # no ": type", so this is no field and has no flag
    data: source = "synthetic"          # 'synthetic', or a folder of images, see README
    n_images: whole = 4096              # how many to draw if synthetic
    held_out: within(0, 0.5) = 0.1            # share of patients, lesions or images not trained on
    turns: Literal["all", "mirror", "none"] = "all"     # mirror or none if they have an up and down
    size: whole = 64                    # side of the square images, in pixels
    widths: wholes = (16, 64)           # channels of the m DownBlocks, such as 16,32,64; f = 2^m
    z_dim: whole = 3                    # d, the length of a code. LDM: 3 at f = 4, 8 at f = 16
    codes: whole = 2048                 # K, the number of codes. LDM: 8192 at f = 4, 16384 at 16
    lpips_weight: amount = 0.1          # weight of LPIPS (section 4). At 0 it is only measured
    commit_weight: amount = 0.25        # weight of the commitment loss, VQ's β (section 3)
    gan_weight: amount = 0.2            # weight of the GAN, times lam. 0: none. 0.4 suits 128×128
    lam_max: amount = 0.004             # upper limit of lam, which balances the GAN (section 4)
    gan_start: amount = 0.1             # fraction of the run after which the GAN joins
    muon_lr: amount = 0.02              # learning rate of Muon (appendix F). 0: Adam at --lr
    codes_lr: amount = 0.02             # learning rate of the codes, which must keep up with z
    d_lr: amount = 4e-4                 # learning rate of the GAN's discriminator
    batch_size: whole = 8               # images in a step, over all processes
    epochs: within(1e-6, 1e6) = 3       # passes over the training images, such as 3 or 5.5

    @property
    def latent_shape(self):
        """(d,h,w) of z, for square images."""
        side = self.size // 2 ** len(self.widths)
        return self.z_dim, side, side

def build_vq(cfg, device):              # -> VQGAN and D, with their initial weights
    unit = 4 * 2 ** len(cfg.widths)             # 4·f, since the UNet's default halves h and w twice
    demand(32 <= cfg.size <= 4096 and cfg.size % unit == 0,
           f"--size: from 32 to 4096, a multiple of {unit}")
    torch.manual_seed(cfg.seed % 2**63)
    vqgan, disc = VQGAN(cfg), PatchDiscriminator(cfg.widths)
    return place(vqgan, device), place(disc, device)

def vq_optimizers(vqgan, disc, cfg):
    """-> Adam and Muon for the VQGAN, Adam for D with the betas of VQGAN's code. Muon (appendix F)
    moves the kernels of all blocks. Adam moves the rest, including the layers first and last."""
    others = dict(vqgan.named_parameters())
    e = others.pop("codebook.embedding.weight")                           # (K,d)
    matrices, rest = [], []
    for name, p in others.items():
        by_muon = cfg.muon_lr > 0 and p.ndim == 4 and not re.search("first|last", name)
        (matrices if by_muon else rest).append(p)
    # Codes need a rate of their own to keep up with z (Łańcucki 2020, arXiv 2005.08520).
    groups = [{"params": rest}, {"params": [e], "lr": cfg.codes_lr}]
    adam = torch.optim.Adam(groups, cfg.lr, betas=(0.9, 0.99), fused=True)
    adam_d = torch.optim.Adam(disc.parameters(), cfg.d_lr, betas=(0.5, 0.9), fused=True)
    return adam, Muon(matrices, cfg.muon_lr), adam_d

# The square's symmetries by number: 0 is none, 4 is the mirror image. All by default, since a
# lesion has no right way up.
TURNS = {"all": range(8), "mirror": (0, 4), "none": (0,)}

def augment(x, turns):
    """Turn or mirror each image of x (B,C,H,H) as B numbers in 0…7 say."""
    turned = []
    for image, turn in zip(x, turns):
        if turn >= 4:
            image = image.flip(2)
        turned.append(image.rot90(int(turn), (1, 2)))
    return torch.stack(turned)

@torch.no_grad()
def reconstruct(vqgan, pixels, lpips, autocast):
    """uint8 (n,3,H,W) -> measures by name, and the reconstructions as uint8 (n,3,H,W)"""
    e = vqgan.codebook.embedding.weight                                   # (K,d)
    measures, all_k, recon = Counter(), [], []
    for batch in pixels.split(8):
        x = to_float(batch).to(e.device)                                  # (B,3,H,W)
        with autocast():
            k = vqgan.encode(x)                                           # (B,h,w)
            x_hat = vqgan.decode(k).clamp(-1, 1)
        mse = F.mse_loss(x_hat, x, reduction="none").mean((1, 2, 3))      # (B,)
        psnr = 10 * torch.log10(4 / mse.clamp(min=1e-10))       # dB: 10 lg(range² / error)
        of_batch = {"mse": mse, "psnr": psnr}   # add a measure here: it is printed, logged, drawn
        if lpips:
            of_batch["lpips"] = lpips(x_hat, x)
        for name, value in of_batch.items():
            measures[name] += float(value.sum()) / len(pixels)
        all_k.append(k.flatten())
        recon.append(to_bytes(x_hat))
    wins = torch.bincount(torch.cat(all_k), minlength=len(e))             # (K,)
    p = wins / wins.sum()
    measures["codes_used_percent"] = 100 * p.count_nonzero().item() / len(p)
    measures["perplexity"] = float(torch.exp(-torch.xlogy(p, p).sum()))
    return dict(measures), torch.cat(recon)

def train_vq(cfg, state=None):
    """Stage 1, from images to a checkpoint. state is a checkpoint to go on from. -> exit status"""
    device, autocast = pick_device(cfg)
    vqgan, disc = build_vq(cfg, device)
    images = Images(cfg.data, cfg, cfg.folder.parent / "cache", state["seen"] if state else ())
    lpips = load_lpips(device)
    had_lpips = state and any("lpips" in row for row in state["log"])
    demand(lpips or not had_lpips, "--resume: LPIPS is missing, but this run began with it")
    adam, muon, adam_d = vq_optimizers(vqgan, disc, cfg)
    parts = {"model": vqgan, "disc": disc, "adam": adam, "muon": muon, "adam_d": adam_d}
    # Appendix C: run yields the steps, knows its progress (0 to 1), logs, looks and saves.
    run = Run(cfg, images, parts, {"seen": images.seen}, state)

    def look():                         # measure and draw images that were never trained on
        held = images.pixels[images.val[:256]]
        measures, recon = reconstruct(vqgan, held, lpips, autocast)
        draw_rows(cfg.folder / f"recon_step_{run.step:06d}.png",
                  {"original": held, "reconstruction": recon})
        return measures

    for step in run:
        factor = lr_factor(step, run.progress)
        rows = images.train[next_rows(run.n_train, step, cfg.batch_size, cfg.seed)]           # (B,)
        symmetries = torch.tensor(TURNS[cfg.turns])
        dice = rng(cfg.seed, "turns", step)
        turns = symmetries[torch.randint(len(symmetries), (cfg.batch_size,), generator=dice)]
        if step % 50 == 0:
            # Unused codes restart, before the batch is shared, so alike in all processes.
            batch = to_float(images.pixels[rows[:16]]).to(device)
            with torch.no_grad(), autocast():
                z = vqgan.encoder(batch).float()
            vqgan.codebook.restart_unused(z, rng(cfg.seed, "restart", step))
        rows, turns = share(rows), share(turns)
        x = augment(to_float(images.pixels[rows]), turns).to(device)      # (B,3,H,W) in [-1,1]

        # ---- the generator: encoder, codebook, decoder ----
        with autocast():
            x_hat, k, codebook_loss, commit_loss = vqgan(x)
        mse = F.mse_loss(x_hat, x)
        losses = {"mse": mse, "codebook": codebook_loss}
        rec = mse
        if lpips:
            losses["lpips"] = lpips(x_hat, x).mean()
            rec = rec + cfg.lpips_weight * losses["lpips"]
        loss = rec + codebook_loss + cfg.commit_weight * commit_loss   # VQGAN eq. 4, VQ eq. 3

        gan_on = cfg.gan_weight > 0 and run.progress >= cfg.gan_start
        if gan_on:
            with autocast():
                real, fake = disc(x), disc(x_hat)
            adversarial = -fake.mean()
            lam = adaptive_weight(rec, adversarial, vqgan.decoder.last.weight, cfg.lam_max)
            loss = loss + cfg.gan_weight * lam * adversarial                  # VQGAN eq. 6

        descend(loss, vqgan, factor, adam, muon)
        vqgan.codebook.count_wins(k)

        # ---- the discriminator, on the same images ----
        if gan_on:
            # D has not moved since, so real and the graph of D(x) still hold. trap: descend(loss)
            # freed that of D(x_hat), so fake is computed anew, and detached. trap: loss has left
            # gradients in D, which would teach it to call fakes real. This descend zeroes them.
            with autocast():
                fake = disc(x_hat.detach())
            d_loss = hinge_loss(real, fake)
            descend(d_loss, disc, factor, adam_d)
            losses.update(lam=lam, d_loss=d_loss, d_real=real.mean(), d_fake=fake.mean())
        run.end_step(losses, look)
    return run.finish("next: python vqldm.py train-ldm --vq")

# ---- 8. Stage 2: diffusion --------------------------------------------------------------------
# Noise is added to a latent in T small steps, until only noise is left. A network learns to find
# the noise in the mix. Sampling starts from pure noise and walks back.
#
# The noise levels are t = 0…T-1. Level 0 already has a little noise, so z_t at t = 0 is not z0. The
# clean latent z0 is one level below, at -1. One step of noising mixes in fresh normal noise ε:
#     z_t = √α_t z_(t-1) + √β_t ε                 where α_t + β_t = 1
# If z_(t-1) has variance 1, then z_t also has variance α_t + β_t = 1.
#
# All steps up to t can be taken at once. With ᾱ_t = α_0 · … · α_t,
#     z_t = √ᾱ_t z0 + √(1-ᾱ_t) ε                  DDPM eq. 4
# Proof: at level -1 it says z0 = z0, with ᾱ = 1. Put eq. 4 for t-1 into the step. z0's factor is
# √α_t √ᾱ_(t-1) = √ᾱ_t. The old noise has variance α_t (1-ᾱ_(t-1)) = α_t - ᾱ_t, the fresh one 1-α_t.
# As they are independent, variances add, to 1-ᾱ_t. So ᾱ_t is z0's share of the variance.
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
#
# One step back leads from t to a lower t_prev. α without an index is ᾱ_t / ᾱ_prev, the product of
# all α after t_prev up to t. So z_t = √α z_prev + √(1-α) ε. For a known z0, Bayes' rule gives
#     mean = (√ᾱ_prev (1-α) z0 + √α (1-ᾱ_prev) z_t) / (1-ᾱ_t)         DDPM eq. 7
#          = (z_t - (1-α)/√(1-ᾱ_t) · ε) / √α     (z0 by eq. 4)        Algorithm 2, line 4
# and the variance (1-α)(1-ᾱ_prev)/(1-ᾱ_t). For an unknown, standard normal z0 the mean
# is √α z_t and the variance 1-α. Real data lie between (DDPM sec. 3.2). We take line 4 with eps_hat
# and variance 1-α. So z_prev of a normal z0 has variance α + 1-α = 1. (See tutorial.ipynb.)

class Diffusion:
    """A noise schedule, the loss of DDPM (Algorithm 1) and two samplers (Algorithm 2, DDIM)."""
    def __init__(self, T=1000, schedule="cosine", target="v"):
        self.T, self.target = T, target
        if schedule == "linear":
            # trap: 1e-4 and 0.02 belong to T = 1000. Unscaled, T = 50 ends at ᾱ = 0.60, and
            # sampling starts from noise that the network never saw.
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        else:
            # Nichol & Dhariwal 2021 (2102.09672) eq. 17. ᾱ_t is a curve divided by its
            # start, so α is a quotient of neighbours. Without 0.008, level 0 would have
            # so little noise that it is hard to predict.
            fraction = torch.arange(T + 1, dtype=torch.float64) / T
            curve = torch.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - curve[1:] / curve[:-1]
        alpha = 1 - beta.clamp(max=0.999)       # β = 1 gives ᾱ = 0, and ε's z0_hat divides by √ᾱ
        alpha_bar = alpha.cumprod(0)            # in float64, so that T roundings do not add up
        demand(alpha_bar[T - 1] < 0.05, "--T: too few levels to end in noise")  # by default 2e-9
        # We append a 1, so that alpha_bar[-1] belongs to level -1, to z0 itself.
        self.alpha_bar = F.pad(alpha_bar, (0, 1), value=1).float()        # (T+1,)

    def abar_at(self, t, z):
        """ᾱ_t, shaped to multiply z. t is (B,), or one number. -> (B,1,1,1) or (1,1,1,1)"""
        return self.alpha_bar.to(z.device)[t].view(-1, 1, 1, 1)

    def add_noise(self, z0, t, eps):                                      # (B,d,h,w), (B,)
        """All steps at once, DDPM eq. 4: z_t = √ᾱ z0 + √(1-ᾱ) ε."""
        abar = self.abar_at(t, z0)
        return abar.sqrt() * z0 + (1 - abar).sqrt() * eps                 # (B,d,h,w)

    def goal(self, z0, eps, abar):      # what the network shall answer, (B,d,h,w)
        if self.target == "eps":
            return eps
        return abar.sqrt() * eps - (1 - abar).sqrt() * z0       # v, Salimans app. D

    def predict(self, out, z_t, t):
        """The network's answer -> (z0_hat, eps_hat), both (B,d,h,w). trap: with ε, an error of the
        network enters z0_hat multiplied by √(1-ᾱ)/√ᾱ. At t = 999 that is 157 with linear and, by
        the clamp, 20,291 with cosine. With v it is at most 1."""
        abar = self.abar_at(t, z_t)
        if self.target == "eps":                    # DDPM eq. 4, solved for z0
            z0_hat = (z_t - (1 - abar).sqrt() * out) / abar.sqrt()
            return z0_hat, out
        # Write √ᾱ = cos φ and √(1-ᾱ) = sin φ. Then z_t = cos φ z0 + sin φ ε and
        # v = -sin φ z0 + cos φ ε. That is a rotation, and here is the rotation back.
        z0_hat = abar.sqrt() * z_t - (1 - abar).sqrt() * out
        eps_hat = (1 - abar).sqrt() * z_t + abar.sqrt() * out
        return z0_hat, eps_hat

    def loss(self, net, z0, t, eps, label):
        """Algorithm 1 -> (B,), the mean of (goal - net(z_t, t))². An output of 0 costs about 1."""
        out = net(self.add_noise(z0, t, eps), t, label)
        goal = self.goal(z0, eps, self.abar_at(t, z0))
        return F.mse_loss(out, goal, reduction="none").flatten(1).mean(1)     # (B,)

    def weight(self, t):
        """The weight of level t (B,) in training on v. ours: 2·√ᾱ·√(1-ᾱ), which is 1 at ᾱ = 1/2. At
        low levels an error of v hardly enters z0_hat, at high ones little can be learned. It is at
        least 1/4, as sampling passes all levels. (NOTES: Kingma & Gao, 2303.00848.)"""
        abar = self.alpha_bar.to(t.device)[t]
        if self.target == "eps":                    # all levels count alike, as in DDPM
            return torch.ones_like(abar)
        return (4 * abar * (1 - abar)).sqrt().clamp(min=0.25)             # (B,)

    def pairs(self, steps):
        """Exactly `steps` pairs (t, t_prev), for 3 steps (999, 666), (666, 333), (333, -1). The
        usual range(0, T, T // steps) can give too many, 1000 for 600 steps of T = 1000."""
        ts = [self.T - 1 - (self.T * i) // steps for i in range(steps + 1)]
        return list(pairwise(ts))

    @torch.no_grad()
    def sample(self, net, z, steps, sampler, noise):
        """Walk back from z (B,d,h,w), standard normal noise. net(z_t, t) is v or ε. noise() draws
        more, in z's shape. Each step yields the new z and z0_hat. The last z is the sample."""
        demand(sampler in ("ddim", "ddpm"), f"no sampler is called {sampler}")
        for t, t_prev in self.pairs(steps):
            abar = self.abar_at(t, z)
            abar_prev = self.abar_at(t_prev, z)
            t_all = torch.full((len(z),), t, device=z.device)             # (B,)
            z0_hat, eps_hat = self.predict(net(z, t_all), z, t_all)

            if sampler == "ddim":
                # Add the noise just found to z0_hat again, but only up to level t_prev. Nothing
                # here is random, so the first z decides everything (DDIM eq. 12 with σ = 0).
                z = abar_prev.sqrt() * z0_hat + (1 - abar_prev).sqrt() * eps_hat
            else:
                # Algorithm 2, line 4: the mean derived above, then fresh noise.
                # trap: a step may span several levels. ᾱ is a product, so the α of the whole step
                # is ᾱ_t / ᾱ_prev. With the α_t of one level, each step would take away too little.
                alpha = abar / abar_prev
                z = (z - (1 - alpha) / (1 - abar).sqrt() * eps_hat) / alpha.sqrt()
                # trap: the last step gives z0_hat. Noise after it leaves a grain in every sample.
                if t_prev >= 0:
                    z = z + (1 - alpha).sqrt() * noise()
            yield z, z0_hat

# ---- 9. Stage 2: the UNet ---------------------------------------------------------------------
# The VQGAN's blocks, but every ResBlock is told the noise level t and the class, and an UpBlock is
# also given the grid that its DownBlock has made, by a skip connection. Noise is different in
# every cell, so it would not fit through the small grid in the middle.

def time_embedding(t, dim):
    """t (B,) -> (B,dim), sines and cosines of growing period (Vaswani 2017, arXiv 1706.03762). The
    fast ones tell neighbouring levels apart, the slow ones distant levels."""
    frequency = 10_000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))   # (dim/2,)
    angle = t.float()[:, None] * frequency                                # (B,dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                   # (B,dim)

class UNet(nn.Module):
    """(z_t, t, class) -> v or ε. The classes are 0…n_classes-1. The number n_classes stands for an
    unknown class, which guidance can ask for (section 11), so a tenth of the training has it."""
    def __init__(self, z_dim, widths, n_classes, upsample="nearest"):
        super().__init__()
        E = 4 * widths[0]
        self.n_classes = n_classes
        self.time = nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, E))
        self.label = nn.Embedding(n_classes + 1, E)
        self.first = nn.Conv2d(z_dim, widths[0], 3, padding=1)
        channels = channel_pairs(widths)                                  # 64 → 64 → 128
        self.down = nn.ModuleList([DownBlock(c_in, c_out, E) for c_in, c_out in channels])
        self.mid = MidBlock(widths[-1], E)
        # Each UpBlock mirrors a DownBlock. Its skip has as many channels as what comes from below:
        # 128 + 128 → 64, then 64 + 64 → 64. (DDPM has one skip for each ResBlock.)
        self.up = nn.ModuleList()
        for c_out, c_in in reversed(channels):
            self.up.append(UpBlock(c_in, c_out, E, c_skip=c_in, upsample=upsample))
        self.norm = Norm(widths[0])
        self.last = zero(nn.Conv2d(widths[0], z_dim, 3, padding=1))

    def forward(self, z_t, t, label=None):                                # (B,d,h,w), (B,), (B,)
        E = self.time[0].in_features
        emb = self.time(time_embedding(t, E))                             # (B,E)
        if label is None:
            label = torch.full_like(t, self.n_classes)
        emb = emb + self.label(label)               # so time and class reach each block together
        y = self.first(z_t)
        skips = []
        for block in self.down:
            y, skip = block(y, emb)
            skips.append(skip)
        y = self.mid(y, emb)
        for block in self.up:
            y = block(y, emb, skips.pop())
        return self.last(F.silu(self.norm(y))).float()                    # (B,d,h,w)

def build_unet(cfg, vq_cfg, classes):
    demand(vq_cfg.latent_shape[-1] % 2 ** len(cfg.widths) == 0,
           "--widths: a grid cannot be halved so many times")
    return UNet(vq_cfg.z_dim, cfg.widths, len(classes), cfg.upsample)

# ---- 10. Stage 2: training --------------------------------------------------------------------
# First the frozen encoder turns each image, in several orientations, into grids of code
# numbers. Their codes are the latents, just what the decoder reads. (LDM takes z, not yet
# rounded.) Noising ends at mean 0 and std 1, so we bring the codes to that mean and std. Judge
# the model by its samples. Even a perfect network's loss stays well above 0, since many z0 fit
# one z_t. By default the shapes are:
#     k (4096,4,16,16) → z_q (32,3,16,16) → z0 (32,3,16,16) → z_t (32,3,16,16) → v (32,3,16,16)

@dataclass(frozen=True)
class LDMConfig(Sampling, Training):
    """stage 2: train the diffusion model on the VQGAN's codes"""
    stage = "ldm"
    vq: str = "runs/vq"                 # run or checkpoint of train-vq. A resumed run keeps its own
    data: source = ""                   # folder of images. Empty means those of --vq
    unconditional: bool = False         # no classes: all images count as one class
    balance: bool = False               # draw every class equally often, however rare it is
    T: whole = 1000                     # noise levels, as many as in DDPM
    schedule: Literal["cosine", "linear"] = "cosine"    # how noise grows with t
    target: Literal["v", "eps"] = "v"   # what the UNet predicts. With eps take linear, see predict
    widths: wholes = (64, 128)          # channels of the UNet's DownBlocks
    ema: within(0, 1) = 0.995           # decay of the running mean of the weights
    batch_size: whole = 32              # latents in a step, over all processes
    epochs: within(1e-6, 1e6) = 27      # passes over the training images, each randomly turned

class Latents:
    """All images as standardised latents z0, each in V of the turns that stage 1 learned. With
    one grid for each image, 340 epochs on 300 photographs made most samples copies."""
    def __init__(self, vqgan, images, device, autocast, scale=None):
        self.codebook = vqgan.codebook
        # 20,000 grids take minutes to encode, so 4,096 images get just 4 turns each.
        enough = max(1, 20_000 // len(images.labels))
        self.turns = TURNS[vqgan.cfg.turns][:enough]                      # V of them
        self.k = encode_images(vqgan, images, self.turns, device, autocast)             # (n,V,h,w)
        if scale is None:               # a resumed run has the one that its network knows
            scale = measure_scale(self.k[images.train], self.codebook.embedding.weight)
        self.scale = scale.to(device)                                     # (2,d)

    def __call__(self, rows, version):                                    # (B,), (B,) in 0…V-1
        return standardise(self.codebook.lookup(self.k[rows, version]), self.scale)   # (B,d,h,w)

def encode_images(vqgan, images, turns, device, autocast):
    """All images -> their code numbers (n,V,h,w), in V turns. (16 at once would be slower.)"""
    all_k = []
    for rows in bar(torch.arange(len(images.labels)).split(8), "encoding"):
        x = to_float(images.pixels[rows]).to(device)                      # (8,3,H,W)
        with autocast():
            k = [vqgan.encode(augment(x, [turn] * len(x))) for turn in turns]
        all_k.append(torch.stack(k, dim=1).int())                         # (8,V,h,w)
    return torch.cat(all_k)

def measure_scale(k, e):
    """Mean and std of the codes e (K,d) in the grids k -> (2,d), a pair for each channel, as in
    Karras 2024 (arXiv 2312.02696). LDM's app. G has one std for all."""
    std, mean = torch.std_mean(e[k.flatten()], 0, correction=0)           # (d,) each
    return torch.stack([mean, std.clamp(min=1e-6)])

def standardise(z, scale):
    """z (B,d,h,w) -> z0. Only this and unstandardise, the way back, use the scale. trap: with the
    std of another model, z0 does not have std 1, and samples get wrong colours and contrast."""
    mean, std = scale.view(2, -1, 1, 1)                                   # (d,1,1) each
    return (z - mean) / std

def unstandardise(z0, scale):
    mean, std = scale.view(2, -1, 1, 1)
    return z0 * std + mean

@torch.no_grad()
def update_ema(ema, net, step, decay):
    """ema <- decay·ema + (1-decay)·net, for sampling. It averages the scatter of single steps.
    trap: with 0.9999 from the first step on, 1,000 steps keep 90 % of the random first weights."""
    decay = min(decay, (1 + step) / (10 + step))        # 0.1 at step 0, 0.9 at 80, 0.99 at 890
    for mean, p in zip(ema.parameters(), net.parameters()):
        mean.lerp_(p, 1 - decay)

def train_ldm(cfg, state=None):
    """Stage 2, from a stage-1 checkpoint to one that holds both stages. -> exit status"""
    device, autocast = pick_device(cfg)

    # ---- stage 1, frozen (a resumed run contains it), and the images ----
    vq = state["vq"] if state else load_checkpoint(cfg.vq, "--vq", "vq")
    seen = (state or vq)["seen"]
    vqgan = load_vqgan(vq, device)
    images = Images(cfg.data or vqgan.cfg.data, vqgan.cfg, cfg.folder.parent / "cache", seen)
    if cfg.unconditional:
        images.classes, images.labels = ["images"], torch.zeros_like(images.labels)
    classes = images.classes
    demand(not state or classes == state["classes"], "--resume: the classes have changed")
    class_counts = torch.bincount(images.labels[images.train], minlength=len(classes))

    # ---- net is the UNet, ema its weights' running mean, young an early copy of ema ----
    diffusion = Diffusion(cfg.T, cfg.schedule, cfg.target)
    torch.manual_seed(cfg.seed % 2**63)
    net = place(build_unet(cfg, vqgan.cfg, classes), device)
    ema = copy.deepcopy(net).requires_grad_(False)
    young = copy.deepcopy(ema)
    adam = torch.optim.Adam(net.parameters(), cfg.lr, betas=(0.9, 0.99), fused=True)

    parts = {"model": net, "ema": ema, "guide": young, "adam": adam}
    extra = {"vq": {"config": vq["config"], "model": vq["model"]}, "seen": images.seen,
             "classes": classes, "class_counts": class_counts}
    run = Run(cfg, images, parts, extra, state)     # first, as it refuses bad data at once
    latents = Latents(vqgan, images, device, autocast, state["scale"] if state else None)
    extra["scale"] = latents.scale                  # run holds this dict, not a copy

    def batch(step):
        # -> this process's share of z0, t, eps and label of a step
        dice = rng(cfg.seed, "step", step)
        chosen = next_rows(run.n_train, step, cfg.batch_size, cfg.seed)       # (B,)
        if cfg.balance:                 # instead, draw images by the rarity of their class
            rarity = 1 / class_counts[images.labels[images.train]]            # (n_train,)
            chosen = rarity.multinomial(cfg.batch_size, replacement=True, generator=dice)
        rows = images.train[chosen]                                           # (B,)
        version = torch.randint(len(latents.turns), (cfg.batch_size,), generator=dice)
        # trap: t must reach T-1, where sampling starts, and 0, the last one if S = T.
        t = torch.randint(cfg.T, (cfg.batch_size,), generator=dice)           # (B,) in 0…T-1
        eps = torch.randn(cfg.batch_size, *vqgan.cfg.latent_shape, generator=dice)
        hidden = torch.rand(cfg.batch_size, generator=dice) < 0.1             # a tenth, as in CFG
        label = images.labels[rows].masked_fill(hidden, len(classes))
        return [share(x).to(device) for x in (latents(rows, version), t, eps, label)]

    # ---- what every look measures: held-out latents, not turned, at the same t and noise ----
    val = images.val[:256]
    z0 = latents(val, torch.zeros_like(val))
    held = {"z0": z0, "t": torch.linspace(0, cfg.T - 1, len(val), device=device).long(),
            "eps": torch.randn(z0.shape, generator=rng("held-out noise")).to(device),
            "label": images.labels[val].to(device)}

    def look():
        # Their loss, and 16 samples, at each look from the same noise, by ema (section 11).
        model = LatentDiffusion(run.checkpoint(), device, autocast)
        with autocast():
            held_loss = diffusion.loss(model.net, **held).mean()
        quick = replace(cfg, steps=min(cfg.steps, 25))
        pictures, z0 = model.make(quick, range(16), model.labels(16))
        draw_rows(cfg.folder / f"samples_step_{run.step:06d}.png", {"samples": pictures})
        return {"loss": held_loss, "latent_std": z0.std()}

    for step in run:
        z0, t, eps, label = batch(step)
        with autocast():
            loss = diffusion.loss(net, z0, t, eps, label)                     # (B,) Algorithm 1
        weighted = (loss * diffusion.weight(t)).mean()
        descend(weighted, net, lr_factor(step, run.progress), adam)
        update_ema(ema, net, step, cfg.ema)
        if run.progress < 0.2:                  # after that, young keeps its weights
            young.load_state_dict(ema.state_dict())
        run.end_step({"loss": loss.mean()}, look)       # without the weight: 1 = nothing learned
    return run.finish("next: python vqldm.py sample --ckpt")

# ---- 11. Sampling -----------------------------------------------------------------------------
# Walk back from noise in S steps, unstandardise, decode.

@dataclass(frozen=True)
class SampleConfig(Sampling, Settings):
    """make new images with a trained stage 2, with train-ldm's sampler unless you name another"""
    stage = "samples"
    ckpt: str = "runs/ldm"              # run folder or checkpoint of train-ldm
    n: whole = 64                       # how many images, over all classes
    class_: str = ""                    # only this class. Empty: all in turn (evaluate: as unseen)

@dataclass(frozen=True)
class EvaluateConfig(SampleConfig):
    """measure a trained stage 2 on images that it was not trained on"""
    data: source = ""                   # folder of other images. Empty means those of --ckpt
    n: whole = 500                      # samples to make, and a limit for each set of unseen images

def guided(strong, *weaker):
    """-> a net(z_t, t) that goes further in the direction from weaker networks to a strong one:
        out = strong + (w - 1) (strong - weak) + …
    weaker are pairs (weak, w). --guidance is the w of the younger self, ema after a fifth of the
    run. Its mistakes are strong's, only larger, so a step away from it undoes some (Karras 2024,
    2406.02507). --class-guidance is the w of strong itself when not told the class. A step away
    adds what sets the class apart. This CFG (eq. 6, whose w is our w - 1) costs variety."""
    def net(z_t, t):
        out = answer = strong(z_t, t)
        for weak, w in weaker:
            if w != 1:
                out = out + (w - 1) * (answer - weak(z_t, t))
        return out
    return net

class LatentDiffusion:
    """All that makes images, from a checkpoint of stage 2, which holds its VQGAN too."""
    def __init__(self, state, device, autocast):
        self.device, self.autocast = device, autocast
        self.vqgan = load_vqgan(state["vq"], device)
        with blame("the UNet is of another version"):
            self.cfg = LDMConfig(**state["config"])
            self.diffusion = Diffusion(self.cfg.T, self.cfg.schedule, self.cfg.target)
            self.classes, self.class_counts = state["classes"], state["class_counts"]
            self.scale = state["scale"].to(device)                        # (2,d)
            # net holds ema's weights, young those of ema after a fifth of the run.
            unet = place(build_unet(self.cfg, self.vqgan.cfg, self.classes), device)
            self.net = unet.eval().requires_grad_(False)
            self.young = copy.deepcopy(self.net)
            self.net.load_state_dict(state["ema"])
            self.young.load_state_dict(state["guide"])

    def labels(self, n, class_=""):
        """-> (n,), the numbers of all trained classes in turn, or only of class_"""
        trained = [c for c, count in enumerate(self.class_counts) if count]
        choices = [c for c in trained if class_ in ("", self.classes[c])]
        demand(choices, "--class: none of that name was trained on, choose one of "
               f"{[self.classes[c] for c in trained]}")
        return torch.tensor(choices)[torch.arange(n) % len(choices)]

    def walk(self, settings, ids, label):
        """-> Diffusion.sample's iterator, so no network runs before you loop over it. settings has
        seed and the fields of Sampling. Image 7 gets the same noise in whatever batch it is."""
        dice = [rng(settings.seed, "sample", int(i)) for i in ids]

        def noise():                                                      # (B,d,h,w)
            drawn = [torch.randn(self.vqgan.cfg.latent_shape, generator=one) for one in dice]
            return torch.stack(drawn).to(self.device)

        label = label.to(self.device)
        strong = partial(self.net, label=label)
        young = partial(self.young, label=label)
        net = guided(strong, (young, settings.guidance), (self.net, settings.class_guidance))
        return self.diffusion.sample(net, noise(), settings.steps, settings.sampler, noise)

    def decode(self, z0):
        """Latents z0 (B,d,h,w) -> uint8 images (B,3,H,W). The decoder has only ever seen codes, so
        what stage 2 makes is rounded to codes."""
        with self.autocast():
            k = self.vqgan.codebook.nearest(unstandardise(z0, self.scale))
            return to_bytes(self.vqgan.decode(k))

    def make(self, settings, ids, label):
        """-> uint8 images (n,3,H,W) and their latents z0 (n,d,h,w), on the CPU."""
        pictures, latents = [], []
        for i in bar(range(0, len(label), 32), "sampling"):
            batch = slice(i, i + 32)
            with self.autocast():
                for z_t, _ in self.walk(settings, ids[batch], label[batch]):
                    z0 = z_t
            pictures.append(self.decode(z0))
            latents.append(z0.cpu())
        return torch.cat(pictures), torch.cat(latents)

def load(where, device="auto"):
    """For Python, see README: a run folder or checkpoint of train-ldm -> a LatentDiffusion."""
    state = load_checkpoint(where, "load", "ldm")
    return LatentDiffusion(state, *pick_device(Settings(device=device)))

def sample(cfg, state):
    """New images -> PNGs in a folder for each class, and grid.png"""
    demand(not any(cfg.folder.glob("*")), f"--out {cfg.folder}: is not empty; name a new folder")
    model = LatentDiffusion(state, *pick_device(cfg))
    label = model.labels(cfg.n, cfg.class_)                               # (n,)
    names = [re.sub(r"[^\w ,+-]", "_", name) for name in model.classes]   # safe as folders
    if len({name.lower() for name in names}) < len(names):              # "<5 mm" and ">5 mm"
        names = [f"{c} {name}" for c, name in enumerate(names)]
    for c in label.unique():
        (cfg.folder / names[c]).mkdir(parents=True, exist_ok=True)
    (cfg.folder / "grid.png").open("x").close()     # fails now, and not after hours
    grid = {}
    for ids in torch.arange(cfg.n).split(64):
        pictures, z0 = model.make(cfg, ids, label[ids])
        for i, image in zip(ids, pictures):
            path = cfg.folder / names[label[i]] / f"{i:05d}.png"
            path.write_bytes(bytes(encode_png(image).numpy()))  # (write_png ignores a full disk)
        if not grid:                                    # of the first 64 images, at most 16 a class
            grid = {names[c]: pictures[label[ids] == c] for c in label.unique()}
            std = z0.std()
    draw_rows(cfg.folder / "grid.png", grid)
    say("look at", cfg.folder / "grid.png", "" if 0.7 < std < 1.4 else "WARNING",
        f"latents have std {std:.2f}, healthy is 0.7 to 1.4")

# ---- A. Drawn lesions -------------------------------------------------------------------------
# Of each class: four colours, how ragged the border is, how dark the pigment mesh (below 0: pale).
LESIONS = {"keratosis-like": ("b89970 997a57 ccb894 8c7866", .09, .05),
           "melanoma-like": ("42261c 734a33 545c78 8c4545", .20, .20),
           "nevus-like": ("854f38 9e6647 613829 ad6b57", .04, .24),
           "vascular-like": ("a81f2e 851433 c23d42 661f47", .04, -.22)}
SKIN = "edbda8 e69e99 ccadb2 e8c294 d699a3"

def synthetic(i, size, seed=0):
    """Draw image i of the endless set that seed defines, uint8 (3,size,size)."""
    dice = rng(seed, "lesion", i)
    colours, ragged, mesh = list(LESIONS.values())[i % len(LESIONS)]

    def span(lo, hi, *shape):           # the next random numbers, uniform in lo…hi
        return lo + (hi - lo) * torch.rand(shape, generator=dice)

    def clouds(cells, n=1):             # random grids (n,size,size), smoothly enlarged
        coarse = span(-1, 1, 1, n, cells, cells)
        return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0]

    def paint(colours, amounts):        # n colours, mixed by amounts (n,H,W)
        rgb = torch.tensor(list(bytes.fromhex(colours))).view(-1, 3) / 255              # (n,3)
        return torch.einsum("nhw,nc->chw", amounts.softmax(0), rgb)                     # (3,H,W)

    axis = torch.linspace(-1, 1, size)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))        # (2,H,W)
    x, y = plane + .15 * clouds(5, 2)           # (H,W) each, bent, so that nothing is quite round
    # Five tones of skin, of which one usually wins. Patches of a ragged body are sharper.
    skin = paint(SKIN, span(0, 6, 5, 1, 1) + clouds(3, n=5)) + .03 * clouds(24)
    body = paint(colours, (3 + 40 * ragged) * clouds(4, n=4)) + .05 * clouds(16)
    # The pigment network: lines where the two nearest of 40 points are about equally far away.
    points = span(-.8, .8, 2, 40, 1, 1)
    distance = torch.hypot(x - points[0], y - points[1])                  # (40,H,W)
    first, second = distance.topk(2, dim=0, largest=False).values         # (H,W) each
    body *= 1 - mesh * torch.exp(-(15 * (second - first)) ** 2)
    radius = span(.30, .56) + 2 * ragged * clouds(6)
    inside = torch.sigmoid(50 * (radius - torch.hypot(x, y)))             # (1,H,W), 1 inside
    image = torch.lerp(skin, body, inside)
    # On 4 of 14 images (int cuts towards 0) one to four hairs, dark lines of any place and turn.
    for _ in range(int(span(-9, 5))):
        turn = span(0, 6.3)
        across = y * turn.cos() - x * turn.sin() + span(-.8, .8)
        image *= 1 - .75 * torch.sigmoid((.01 - across.abs()) * size)
    return torch.round(255 * image.clamp(0, 1)).byte()

# ---- B. A folder of images --------------------------------------------------------------------
# One bad image can end a run after hours, and decoding JPEGs would take most of a laptop's
# time. So each image is opened once, before training, and its pixels are kept in one file.
READ_IMAGE = 2      # part of the cache's name: add 1 after a change of read_image or synthetic
SUFFIX = r"(?i)\.(avif|bmp|gif|hei[cf]|jfif|jp2|jpe|jpe?g|mpo|png|tiff?|webp)$"
# Not used: other formats, masks (a face with_mask is used), hidden files, our own pictures.
NO_PHOTO = (r"(?i)\.(avif|hei[cf]|jp2|jpe|mpo)$"
            r"|(_seg|_segmentation|_superpixels|_expert\d*|[_-]mask|-partial)\.\w+$"
            r"|(^|/)(masks/|runs/|\.|(grid|curves|evaluate|(recon|samples)_step_\d+)\.png$)")
WITH_MASK = r"(?i)with(out)?[_-]mask"
# Folders that are held out, and folders that are no class: nevus/train/1.jpg is of class nevus.
HELD_OUT = {"val", "valid", "validation", "test", "testing"}
NO_CLASS = HELD_OUT | {"train", "training", "images"}
# Columns of tables, as ISIC and HAM10000 call them, in any case, with any blanks, - or _.
ID = "isic_id", "image_id", "image_name", "image"
CLASS = "diagnosis_3", "diagnosis_1", "dx", "diagnosis", "class", "label", "target"
GROUP = "patient_id", "lesion_id"
COLUMNS = {column.replace("_", ""): column for column in ID + CLASS + GROUP}
UNKNOWN = {"unknown", "na", "n/a", "nan", "none"}       # patients and lesions

def read_image(data, size):
    """A file's bytes -> its middle square, uint8 (3,size,size)."""
    # PIL goes by content. Unless told, it starts Ghostscript for a PostScript file called x.png.
    with Image.open(io.BytesIO(data), formats="BMP GIF JPEG PNG TIFF WEBP".split()) as im:
        im.draft("RGB", (size, size))           # JPEG at 1/2, 1/4 or 1/8 of its size, much faster
        demand(im.mode in ("L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"), f"{im.mode} is not 8 bits")
        im = ImageOps.exif_transpose(im)        # cameras store "turn me" beside the pixels
        if im.has_transparency_data:
            # trap: convert("RGB") would show whatever colours lie below the transparent pixels.
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return pil_to_tensor(ImageOps.fit(im.convert("RGB"), (size, size)))

def stem_of(name):
    """a/ISIC_1.JPG, ISIC_1 and isic_1 name one image."""
    return re.sub(SUFFIX, "", name.split("/")[-1]).lower()

def filled(row, columns):
    """The first of these columns that says something, or ""."""
    return next((column for column in columns if row.get(column)), "")

def column_of(title):
    title = title.strip().lower()
    return COLUMNS.get(re.sub(r"[\s_-]", "", title), title)

def read_tables(folder):
    """The .csv files in a folder and beside it -> {stem: {column: word}}"""
    tables = {}
    for path in sorted([*folder.parent.glob("*.csv"), *folder.glob("*.csv")]):
        try:
            with path.open(encoding="utf-8-sig", newline="") as f:
                mark = max(",;\t", key=f.readline().count)      # many spreadsheets write semicolons
                f.seek(0)
                table = csv.DictReader(f, delimiter=mark, strict=True)  # strict about open quotes
                for row in table:
                    row = {column_of(title): word.strip() for title, word in row.items()
                           if title and word and word.strip()}
                    for column in GROUP:
                        if row.get(column, "").lower() in UNKNOWN:
                            del row[column]
                    name = row.get(filled(row, ID), "")
                    row[f"named in {path.name}"] = "yes"       # describe counts these
                    tables.setdefault(stem_of(name), {}).update(row)
                about = re.compile("(?i)patient|lesion|subject")
                unused = [title for title in filter(about.search, table.fieldnames or ())
                          if column_of(title) not in GROUP]
                if unused:
                    say("WARNING", path, "columns not used to keep images together:", *unused)
        except (csv.Error, OSError, ValueError) as e:
            say("WARNING the table", path, f"breaks off: {e!r:.200}")
    return tables

def marks_of(tables):
    """The columns that hold nothing but 0 and 1, if there are two or more. Each marks a class."""
    words = {}
    for row in tables.values():
        for column, word in row.items():
            words.setdefault(column, set()).add(word)
    marks = [column for column, found in words.items()
             if found <= {"0", "1", "0.0", "1.0"} and column not in ID + GROUP]
    return marks if len(marks) > 1 else []

def roles(folder):
    """The words that make a folder no class: {"val"}, or {"test"} of ISIC_2019_Test_Input."""
    words = re.split("[-_]", folder.lower())
    archive = words[0].startswith(("isic", "ham10000"))
    return NO_CLASS.intersection(words if archive else [folder.lower()])

def class_of(row, folder, marks):
    """-> an image's class, and what tells it. A column that names classes comes before the
    folder, and columns of 0 and 1 come after it."""
    column = filled(row, CLASS)
    if column:
        return row[column], f"column {column}"
    ones = [mark for mark in marks if row.get(mark) in ("1", "1.0")]
    if folder or len(ones) != 1:
        return folder or "images", "folder"
    return ones[0], "columns of 0 and 1"

def find_images(folder):
    """-> {name: what changes with its file} of all images in a folder, for the cache's name"""
    def refuse(error):                  # or else a class that cannot be read would be left out
        raise UserError(f"--data: {error}")

    names, passed_over = {}, 0
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]       # walk only into these
        # os.walk follows no links to folders, which may lead in a circle.
        passed_over += sum(Path(parent, name).is_symlink() for name in folders)
        for path in [Path(parent, file) for file in files if re.search(SUFFIX, file)]:
            name = path.relative_to(folder).as_posix()
            if re.search(NO_PHOTO, re.sub(WITH_MASK, "face", name)):
                passed_over += 1
            elif path.is_file():        # (the date alone may be that of all files of an archive)
                info = path.stat()
                names[name] = info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino
    if passed_over:
        say("not used:", passed_over, "masks, links to folders, HEIC files and the like")
    return dict(sorted(names.items()))

def read_pixels(source, cfg, cache):
    """-> pixels, uint8 (n or more,3,size,size), and {name: checksum of its content} of n images."""
    folder = Path(source)
    if source == "synthetic":
        numbered = zip(range(cfg.n_images), cycle(LESIONS))
        names = {f"{class_name}/{i}": cfg.seed for i, class_name in numbered}
    else:
        names = find_images(folder)
    path = cache / f"{cfg.size}-{READ_IMAGE}-{digest((folder, names)):x}.pt"
    try:
        torch.load(path, mmap=True)
    except Exception:                           # not there yet, or damaged
        write_whole(path, decode_all(source, cfg, names))
    pixels, checksums = torch.load(path, mmap=True)     # pixels stay on disk until needed
    if len(checksums) < len(names):
        say("WARNING only", len(checksums), "of", len(names), "images can be read")
    return pixels, checksums

def decode_all(source, cfg, names):
    """The same, from the files or drawn. Broken files leave unused rows at the end of pixels."""
    pixels = torch.empty(len(names), 3, cfg.size, cfg.size, dtype=torch.uint8)
    checksums = {}
    drawn = source == "synthetic"
    for i, name in enumerate(bar(names, "preparing images")):
        # A file that cannot be opened ends the run. A broken one is left out, also next time.
        data = f"{cfg.seed} {name}".encode() if drawn else Path(source, name).read_bytes()
        try:
            image = synthetic(i, cfg.size, cfg.seed) if drawn else read_image(data, cfg.size)
        except MemoryError:
            raise
        except Exception as e:                  # PIL raises nearly anything on a broken file
            say("WARNING skipped", name, repr(e))
            continue
        pixels[len(checksums)] = image
        checksums[name] = digest(hashlib.sha256(data).digest())
    return pixels, checksums

def describe(checksums, tables, held_out):
    """{name: checksum}, {stem: row} -> of each image (class, held out?, checksum, group). A group
    is all images of one patient, or of one lesion if no patient is given, or else of one content.
    Whole groups are held out, or val would show trained lesions again. The digits of group decide,
    so that a larger share contains the smaller. Folders val and test are held out as well."""
    marks = marks_of(tables)
    both = [row for row in tables.values() if set(GROUP) <= set(row)]
    patients = {row["lesion_id"]: row["patient_id"] for row in both}
    found, counts, stems, doubts = [], Counter(), Counter(), defaultdict(list)
    for name, checksum in checksums.items():
        stem = stem_of(name)
        row = tables.get(stem, {})
        row = {"patient_id": patients.get(row.get("lesion_id")), **row}     # its own wins
        column = filled(row, GROUP)
        group = digest((column, row[column])) if column else checksum
        # The last digit of group, then the three before it as decimals. Below 1 for a tenth of all.
        place = group % 10 + group // 10 % 1000 / 1000
        folders = name.split("/")[:-1]
        test = any(roles(folder) & HELD_OUT for folder in folders)
        folder = next((folder for folder in reversed(folders) if not roles(folder)), "")
        class_name, by = class_of(row, folder, marks)
        found.append((class_name, test or place < 10 * held_out, checksum, group))
        counts.update(["class by " + by, "split by " + (column or "image")])
        counts.update(title for title in row if title.startswith("named in "))
        stems[stem] += 1
        if stems[stem] > 1 and stem in tables:
            doubts["share a row of a table with another image"].append(name)
        if folder and folder.lower() != class_name.lower():
            doubts["have another class in a table (it counts) than by folder"].append(name)
    say("understood:", ", ".join(f"{what} {n}" for what, n in counts.items()))
    if tables and tables.keys().isdisjoint(stems):
        say("WARNING the tables name none of the images, by a column called one of", ID)
    for what, names in doubts.items():
        say("WARNING", len(names), "images", what + ", such as", names[0])
    return found

# ---- C. Keeping a run -------------------------------------------------------------------------
# A night of training is lost by a checkpoint half written, by a resume that restores only the
# weights, or by settings that silently differ. A checkpoint holds all that the rest follows
# from, so on the same CPU a resume is exact.

def write_whole(path, content, new=False):
    """All or nothing: write beside it, flush, rename. If new, path must not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(content, f)
            os.fsync(f)
        if new:
            path.open("x").close()      # of two runs that begin at once, one fails here
        os.replace(tmp, path)
    except RuntimeError as e:           # torch's word for a full disk
        raise OSError(f"{path}: cannot be written ({e})") from e
    finally:
        tmp.unlink(missing_ok=True)

@contextmanager
def blame(what):
    """Any error in here becomes one sentence."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{what} ({e!r:.100})") from e

NEEDED = {"vq": {"model", "seen", "log"},
          "ldm": {"ema", "guide", "seen", "vq", "scale", "classes", "class_counts"}}

def load_checkpoint(where, flag, *stages):
    """A checkpoint of one of these stages, or last.pt of a run folder -> its dict. flag is blamed.
    (weights_only=False, torch's default before 2.6, runs any code in it.)"""
    path = Path(os.path.expanduser(where))
    path = path / "last.pt" if path.is_dir() else path
    demand(path.is_file(), f"{flag} {where}: no checkpoint is there")
    with blame(f"{path}: cannot be used by this version"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = NEEDED[state["stage"]] - state.keys()
        demand(not missing, f"it has no {sorted(missing)}")
        if state["config"].pop("guide", None):
            say("its setting guide is not used: --class-guidance replaces it")
        settings = {"vq": VQConfig, "ldm": LDMConfig}[state["stage"]](**state["config"])
        say("from", path, "at step", state["step"])
    lacking = asdict(settings).keys() - state["config"].keys()
    if lacking:
        say("it is of an older version, and takes the defaults of", *sorted(lacking))
    demand(settings.stage in stages, f"{flag} {where}: belongs to the other stage")
    return {**state, "settings": settings, "folder": path.parent}

def load_vqgan(state, device):
    """The VQGAN of a checkpoint of stage 1, frozen."""
    with blame("the VQGAN is of another version"):
        vqgan = VQGAN(VQConfig(**state["config"]))
        vqgan.load_state_dict(state["model"])
    return place(vqgan, device).eval().requires_grad_(False)

class Run:
    """Yields steps, logs, looks, saves, until --epochs or a signal ends it. parts are networks and
    optimisers, extra is the rest of a checkpoint, state one to go on from."""
    looks = 10                          # in a run, and one more after ten minutes without one

    def __init__(self, cfg, images, parts, extra, state):
        self.cfg, self.parts, self.extra = cfg, parts, extra
        self.n_train = len(images.train)
        demand(self.n_train and len(images.val), "--data: too few images, or all of one patient, "
               "to hold some out and train on the rest; add images, or a folder val")
        demand(cfg.batch_size % world() == 0, "--batch-size: not a multiple of the process count")
        self.steps = math.ceil(cfg.epochs * self.n_train / cfg.batch_size)
        self.step = 0
        self.log = []
        self.status = 0                 # or 128 + the number of the signal that ended the run
        self.looked = time.perf_counter()
        if state:
            with blame("last.pt is of another version"):
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.step, self.log = state["step"], state["log"]
        say(self.n_train, "images to train on, from step", self.step)
        say(len(images.val), "held out:", images.by_class(images.labels[images.val]))
        say("healthy: codes_used_percent above 25, latent_std 0.7 to 1.4, loss well below 1")

    @property
    def progress(self):
        return self.step / self.steps

    def __iter__(self):
        # Ctrl-C and SIGTERM only ask to finish the step and save. Ctrl-C after either ends at once.
        def ask(number, frame):
            self.status = 128 + number
            signal(SIGINT, default_int_handler)

        if not self.cfg.resume:
            self.save(new=True)         # what cannot be written fails before the work
        with suppress(ValueError):      # signals are for the main thread only
            signal(SIGINT, ask)
            signal(SIGTERM, ask)
        try:
            with bar(None, "training", self.steps - self.step) as self.line:
                while self.step < self.steps and not self.stopped():
                    yield self.step
        finally:
            with suppress(ValueError):
                signal(SIGINT, default_int_handler)
                signal(SIGTERM, SIG_DFL)

    def stopped(self):                  # a signal to one process ends all after this step
        return mean_over_processes(torch.tensor([float(self.status)])).item() > 0

    def end_step(self, losses, look):
        # Log every tenth step. look (measure and draw) at tenths of the run, or after ten minutes.
        tenths = self.looks * self.step // self.steps
        self.step += 1
        self.line.update()
        if self.step % 10 == 0:
            row = {name: float(value.detach()) for name, value in losses.items()}
            self.log.append({"step": self.step, **row})
            self.line.set_postfix(row)
        due = self.looks * self.step // self.steps > tenths
        if rank() == 0 and (due or time.perf_counter() - self.looked > 600):
            row = {"look_" + name: float(value) for name, value in look().items()}
            self.log.append({"step": self.step, **row})
            say(f"{self.progress:4.0%} look:", *[f"{name[5:]} {row[name]:.4g}" for name in row])
            self.save()
            self.looked = time.perf_counter()

    def checkpoint(self):               # all that resuming and sampling need
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return {**state, **self.extra, "stage": self.cfg.stage, "config": asdict(self.cfg),
                "step": self.step, "log": self.log}

    def save(self, new=False):          # by the first process
        if rank():
            return
        folder = self.cfg.folder
        write_whole(folder / "last.pt", self.checkpoint(), new)
        if self.log:
            draw_curves(folder / "curves.png", self.log)
        (folder / "log.json").write_text(json.dumps(self.log, indent=1))

    def finish(self, next_hint):        # -> exit status
        self.save()
        mean_over_processes(torch.zeros(1))     # a barrier: all wait for that save
        hint = next_hint if self.progress >= 1 else "to go on, add --resume; it is in"
        say("saved at step", self.step, "--", hint, shlex.quote(str(self.cfg.folder)))
        return self.status

# ---- D. Pictures ------------------------------------------------------------------------------

@contextmanager
def figure(path, width, height, rows, columns=1):
    """with figure(…) as axes: draw on them. The picture is then written to path."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width, height), layout="constrained")
    yield fig.subplots(rows, columns, squeeze=False).flatten()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)

def draw_rows(path, rows):
    """{label: uint8 images (n,3,H,W)} -> at most 16 strips of at most 16 images"""
    strips = [(label, images[:16]) for label, images in rows.items() if len(images)][:16]
    columns = max(len(images) for _, images in strips)
    with figure(path, columns, 1.3 * len(strips), len(strips)) as axes:
        for ax, (label, images) in zip(axes, strips):
            strip = make_grid(images, columns, pad_value=255)
            ax.imshow(strip.permute(1, 2, 0).numpy())
            ax.set_anchor("W")
            ax.set_title(label, fontsize=9, loc="left", parse_math=False)
            ax.axis("off")

def draw_curves(path, log):
    """The log's numbers over the steps. look_mse and mse share a panel, as do d_real and d_fake."""
    panels = {}
    for name in sorted({name for row in log for name in row} - {"step"}, reverse=True):
        panel = re.sub("look_|_real|_fake", "", name)
        panels.setdefault(panel, []).append(name)
    rows = math.ceil(len(panels) / 2)
    with figure(path, 8, 2.6 * rows, rows, columns=2) as axes:
        axes[-1].set_visible(len(panels) % 2 == 0)      # or the last would stay empty
        for ax, names in zip(axes, panels.values()):
            for name in names:
                points = [(row["step"], row[name]) for row in log if name in row]
                ax.plot(*zip(*points), label=name)
            wide = 0 < ax.dataLim.ymin < ax.dataLim.ymax / 5
            ax.set_yscale("log" if wide else "linear")
            ax.legend(fontsize=7)

# ---- E. Measuring -----------------------------------------------------------------------------
# The kernel distance says how far two sets of images are apart. For two random sets of 300
# photographs it is 0 ± 1, and some 40 where one set lacks fine grain. It uses LPIPS's features,
# so it flatters models trained with them.

def features(lpips, pixels):
    """uint8 (n,3,H,W) -> (n,512)"""
    found = []
    for batch in pixels.split(4):
        x = to_float(batch).to(lpips.scaling_layer.shift.device)
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        last = lpips.net(lpips.scaling_layer(x))[-1]    # SqueezeNet's last map, (B,512,13,13)
        found.append(last.mean((2, 3)))
    return torch.cat(found).cpu().double()

def kernel_distance(a, b):
    """Squared MMD of two sets of features (n,512), as in KID (arXiv 1801.01401): the mean kernel
    of pairs in a, plus that of pairs in b, minus twice that of pairs of one of each."""
    def kernel(u, v):                                                     # (n,n)
        return (u @ v.T / u.shape[1] + 1) ** 3

    pairs = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    # Without the diagonal: no image is paired with itself, nor with its reconstruction in b.
    return float((pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1)))

def unseen_rows(cfg, model, seen, images):
    """-> of those images that no training has seen, shuffled, the rows and the numbers of their
    classes in model. seen are checksums."""
    number = {name: c for c, name in enumerate(model.classes) if model.class_counts[c]}
    if model.cfg.unconditional:
        number = dict.fromkeys(images.classes, 0)
    numbers = torch.tensor([number.get(name, -1) for name in images.classes])[images.labels]
    wanted = torch.tensor([cfg.class_ in ("", name) for name in images.classes])[images.labels]
    unseen = wanted & ~images.known(seen)                                 # (n,) bool
    rows = (unseen & (numbers >= 0)).nonzero().flatten()
    say("to measure on:", len(rows), "images that no training has seen. Not used:",
        int(unseen.sum()) - len(rows), "of classes that were never trained on")
    demand(cfg.n > 1 and len(rows) > 3,
           f"--n, --data, --class: too few unseen images, classes are {images.classes}")
    if len(rows) < 40:
        say("WARNING so few images that the numbers say little")
    rows = rows[torch.randperm(len(rows), generator=rng("unseen"))]
    return rows, numbers[rows]

def nearest_trained(pictures, images, trained):
    """-> of each picture, the distance to its nearest training image, at 32×32 and in any symmetry,
    and that image's row. trained are the rows of the training images."""
    def shrink(rgb):
        return F.interpolate(to_float(rgb), (32, 32), mode="area")

    small = torch.cat([shrink(part) for part in pictures.split(256)]).flatten(1)    # (n,3·32·32)
    small_trained = torch.cat([shrink(images.pixels[part]) for part in trained.split(256)])
    best = torch.tensor(math.inf)
    for turn in range(8):
        turned = augment(small_trained, [turn] * len(trained)).flatten(1)
        best = torch.minimum(best, torch.cdist(small, turned))            # (n,n_trained)
    distance, nearest = best.min(1)
    return distance, trained[nearest]

def near_copies(made, unseen, images, trained):
    """-> measures, and pictures of the samples that are nearest to a training image. A near copy is
    nearer to one than 99 % of the unseen images are. unseen, trained are row numbers."""
    near, row = nearest_trained(made, images, trained)
    usual, _ = nearest_trained(images.pixels[unseen], images, trained)
    # trap: if some unseen images were re-saved copies of trained ones, the limit would be theirs,
    # and total memorising would be reported as none.
    re_saved = usual < usual.median() / 4
    if re_saved.any():
        say("WARNING", int(re_saved.sum()), "unseen images, not used here, look like trained ones")
    usual = usual[~re_saved]
    copies = near < usual.quantile(0.01)
    worst = near.argsort()[:16]
    pictures = {"samples nearest to a training image": made[worst],
                "that image": images.pixels[row[worst]]}
    # Sorted, the u unseen have their limit at place r = 1 + (u-1)/100. A sample that is no copy
    # falls into each of the u+1 gaps equally often. 100 r/(u+1) % are below the limit by chance.
    by_chance = 1 + 98 / (len(usual) + 1)
    measures = {"near_copies_percent": 100 * float(copies.float().mean()),
                "near_copies_by_chance": by_chance}
    return measures, pictures

def evaluate(cfg, state):
    """Measure a checkpoint of stage 2 -> metrics.json, evaluate.png"""
    folder = cfg.folder if cfg.out else state["folder"]
    device, autocast = pick_device(cfg)
    lpips = load_lpips(device)
    model = LatentDiffusion(state, device, autocast)
    data = cfg.data or model.cfg.data or model.vqgan.cfg.data
    images = Images(data, model.vqgan.cfg, folder.parent / "cache")
    unseen, numbers_of_class = unseen_rows(cfg, model, state["seen"], images)
    n = min(cfg.n, len(unseen) // 2)
    real, other = images.pixels[unseen[:2 * n]].split(n)
    numbers, recon = reconstruct(model.vqgan, real, lpips, autocast)
    numbers.update(unseen_images=n, step=state["step"])

    # ---- samples, of the classes of the unseen images ----
    label = numbers_of_class[torch.arange(cfg.n) % n]                     # (cfg.n,)
    made, z0 = model.make(cfg, range(cfg.n), label)
    numbers["latent_std"] = float(z0.std())
    pictures = {"real": real, "recon": recon, "samples": made}
    if lpips:
        # Each set is compared with real. kernel_perfect, of other unseen images after stage 1,
        # is what a perfect stage 2 would have. kernel_real is 0 but for chance.
        perfect = reconstruct(model.vqgan, other, None, autocast)[1]
        sets = {"kernel": made[:n], "kernel_perfect": perfect, "kernel_recon": recon,
                "kernel_real": other}
        a = features(lpips, real)
        for name, b in sets.items():
            numbers[name] = kernel_distance(a, features(lpips, b))

    trained = torch.isin(images.checksums[:, 0], state["seen"]).nonzero().flatten()
    if len(trained) < model.class_counts.sum():
        say("WARNING only", len(trained), "training images are here: not all copies are found")
    if len(trained):
        measures, found = near_copies(made, unseen[:1000], images, trained)
        numbers.update(measures)
        pictures.update(found)
    for name, value in numbers.items():
        say(f"{name:24}{value:10.4g}")
    draw_rows(folder / "evaluate.png", pictures)
    (folder / "metrics.json").write_text(json.dumps({**asdict(cfg), **numbers}, indent=1))
    say("look at", folder / "evaluate.png", "and metrics.json")

# ---- F. Muon ----------------------------------------------------------------------------------
# A matrix is a sum of directions u vᵀ, each with a strength s, its singular value. In a kernel's
# gradient, read as (first axis, rest), a few directions far outweigh the others, which hardly
# learn. Adam evens out entries, Muon directions (Jordan 2024, kellerjordan.github.io/posts/muon).

def orthogonal(g):
    """g (r,n) = U S Vᵀ -> nearly U Vᵀ. All strengths but the tiniest become 0.7 to 1.2. This is
    Newton-Schulz. Since x xᵀ x = U S Vᵀ V S Uᵀ U S Vᵀ = U S³ Vᵀ, sums of odd powers change S
    alone. A round takes s to 3.4445 s - 4.775 s³ + 2.0315 s⁵, a small one to 3.4 times itself."""
    x = g / (g.norm() + 1e-7)                   # the norm is √ of the sum of all s², so s ≤ 1
    for _ in range(5):
        gram = x @ x.T                                                    # (r,r)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x

class Muon(torch.optim.Optimizer):
    """Jordan's rule without its factor for a matrix's shape. A step is lr · orthogonal(running mean
    of the gradient, with Nesterov). matrices are convolutions' kernels, or none."""
    def __init__(self, matrices, lr):
        super().__init__([{"params": matrices}], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.05)
                g = p.grad.lerp(mean, 0.95).flatten(1)      # Nesterov: 0.05 grad + 0.95 mean
                p.sub_(group["lr"] * orthogonal(g).view_as(p))

# ---- G. Commands ------------------------------------------------------------------------------
COMMANDS = {"train-vq": (VQConfig, train_vq), "train-ldm": (LDMConfig, train_ldm),
            "sample": (SampleConfig, sample), "evaluate": (EvaluateConfig, evaluate)}
PRESETS = {                             # settings of each stage, which typed ones beat
    "default": {},
    "tiny": {"vq": dict(size=32, n_images=200, widths=(16, 32), codes=64, epochs=4),
             "ldm": dict(T=200, widths=(32, 64), batch_size=16, epochs=16)},
    # The system of a course report, from which this file grew. .267 is 8 of its 30 epochs.
    "report": {"vq": dict(upsample="transposed", lpips_weight=1, commit_weight=1, gan_weight=1,
                          lam_max=1e4, gan_start=.267, epochs=30, lr=3e-4, muon_lr=0,
                          codes_lr=3e-4, d_lr=3e-4),
               "ldm": dict(upsample="transposed", unconditional=True, target="eps",
                           schedule="linear", sampler="ddpm", steps=1000,
                           guidance=1, class_guidance=1)}}
# What may differ when a run is resumed.
MAY_CHANGE = {"resume", "device", "out", "data", "epochs",
              "sampler", "steps", "guidance", "class_guidance"}

class Parser(argparse.ArgumentParser):
    def error(self, message):           # one sentence instead of a page of usage
        raise UserError(message)

def flag_of(name):                      # class_ -> --class, as class is a word of Python
    return "--" + name.strip("_").replace("_", "-")

def build_parser():
    """For each of COMMANDS, a flag for each of its settings, whose comment becomes its help."""
    getsource = cache(inspect.getsource)
    parser = Parser("vqldm.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (cls, _) in COMMANDS.items():
        flags = commands.add_parser(command, help=cls.__doc__, description=cls.__doc__,
                                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
        classes = "".join(getsource(base) for base in cls.__mro__[-2::-1])      # without object
        comments = dict(re.findall(r"\n    (\w+): .*?# (.*)", classes))
        for f in fields(cls):
            choices = get_args(f.type)
            how = {"choices": choices} if choices else {"type": f.type}
            if f.type is bool:
                how = {"action": "store_true"}
            default = str(f.default).strip("()").replace(", ", ",")     # as it can be typed
            if issubclass(cls, SampleConfig) and f.name in Sampling.__annotations__:
                default = "as trained"
            flags.add_argument(flag_of(f.name), dest=f.name, **how,
                               help=f"{comments[f.name]} [{default}]")
    return parser

def settle(argv):
    """-> the command's function, its settings, and the checkpoint that it reads, or None. What is
    typed beats what is given by the model, by the run to resume, or by a preset."""
    typed = vars(build_parser().parse_args(argv or ["--help"]))
    command = typed.pop("command")
    cls, function = COMMANDS[command]
    cfg = cls(**typed)
    state = None
    if not command.startswith("train"):
        state = load_checkpoint(cfg.ckpt, "--ckpt", "ldm")
        given = {f.name: getattr(state["settings"], f.name) for f in fields(Sampling)}
    elif cfg.resume:
        state = load_checkpoint(cfg.folder / "last.pt", "--resume", cfg.stage)
        given = {**asdict(state["settings"]), "out": cfg.out}
        differ = [f"{flag_of(name)} was {given[name]}" for name in typed
                  if name not in MAY_CHANGE and typed[name] != given[name]]
        demand(not differ, f"--resume goes on with the recorded settings: {differ}")
    else:
        demand(rank() or not (cfg.folder / "last.pt").exists(),     # others may see its save
               f"--out {cfg.folder}: holds a run; --resume it, or name another")
        given = PRESETS[cfg.preset].get(cfg.stage, {})
    return function, cls(**{**given, **typed}), state

def main(argv):
    """Run one command. SystemExit is 2 for a mistake or lack of room, 130 or 143 for a signal."""
    if dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with suppress(AttributeError):                      # a notebook's stdout cannot do this
        # For consoles that lack é, and so that lines sent to a file appear at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    status = 2
    try:
        function, cfg, state = settle(argv)
        status = function(cfg, state)
    except KeyboardInterrupt:                           # not while training, or a second one
        print("vqldm: stopped", file=sys.stderr)
        status = 130
    except FileExistsError as e:
        print("vqldm:", e.filename, "is another run's, name another --out", file=sys.stderr)
    except (UserError, OSError) as e:
        print("vqldm:", e, file=sys.stderr)
    except (MemoryError, RuntimeError) as e:            # a MemoryError has no text
        if not re.search("^$|allocate|out of memory", str(e)):
            raise
        print("vqldm: out of memory; a lower --batch-size or --size needs less", file=sys.stderr)
    if status:
        raise SystemExit(status)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main(sys.argv[1:])
