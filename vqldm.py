# SPDX-License-Identifier: MIT
"""vqldm: VQGAN + latent diffusion in one file, from pixels to new images.

Stage 1, the VQGAN, learns to write an image as a small grid of code numbers and to read it back.
Stage 2, latent diffusion, learns to make new grids out of noise, and stage 1 reads these back as
images. Stage 2 works on few numbers, and that is why all of this fits on a laptop.
The images are skin lesions seen through a dermatoscope, drawn or real (ISIC, HAM10000), or yours.

  x ───Enc───► z ───nearest code───► z_q ───Dec───► x_hat       stage 1: VQGAN        (train-vq)
  (B,3,H,W)    (B,d,h,w)  │          (B,d,h,w)      (B,3,H,W)
                          └► k (B,h,w) in 0…K-1                 h = H/f, w = W/f, f = 2^m
  k → z_q → z0 = (z_q-mean)/std ──noise──► z_t ──UNet──► v      stage 2: diffusion    (train-ldm)
  noise ──UNet, S times──► z0 ──·std+mean──► nearest code ──Dec──► image              (sample)

Letters   B batch · C channels · H W pixels · h w latent grid · d length of a code · K codes
          N = h·w places · m halvings · T noise levels · S sampling steps · E size of emb (t, class)
          x image in [-1,1] · z latent · z_q its code · k its number · z0 standardised z_q (DDPM's
          x_0) · z_t the same at noise level t in 0…T-1 · eps the noise ε · v a mix of ε and z0
          alpha_bar is ᾱ · lam is λ, it scales the GAN's loss · a hat: estimated · sg[] is .detach()
Papers    VQ van den Oord 2017 (arXiv 1711.00937) · VQGAN Esser 2021 (2012.09841) · DDPM Ho 2020
          (2006.11239) · DDIM Song 2021 (2010.02502) · LDM Rombach 2022 (2112.10752)
          v Salimans 2022 (2202.00512) · CFG (classifier-free guidance) Ho 2022 (2207.12598)
Contents  1. Settings                       7. Stage 1: training      For reference:
          2. Device, precision, seeds       8. Stage 2: diffusion     A. Drawn lesions  E. Measuring
          3. What the loops see of data     9. Stage 2: the UNet      B. A folder of images
          4. Blocks                        10. Stage 2: training      C. Keeping a run  F. Muon
          5. Stage 1: the VQGAN            11. Sampling               D. Pictures       G. Commands
          6. Stage 1: the losses
Run it    python vqldm.py train-vq, then train-ldm, then sample; evaluate measures.
          "trap" marks a frequent mistake, "ours" an idea from no paper (small ones are unmarked).
"""
import argparse, csv, functools, glob, json, math, os, random, re, shlex, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from inspect import getsource
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, default_int_handler, signal

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch: CPU for what MPS lacks
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
# Every setting is one line here: name, type, default; its comment is its --help.
# (New words are explained where they are used.) What you type beats --preset, which beats the
# default. --resume takes the checkpoint's values; only those in MAY_CHANGE, below, may differ.

class UserError(argparse.ArgumentTypeError):        # argparse catches it, names the flag
    """A mistake that only the user can put right: reported in one sentence; exit status 2."""
def demand(ok, text):                   # if not ok, ends the command (read_image: skips the image)
    if not ok:
        raise UserError(text)

# A setting's type is the function that reads it from the command line.
def count(text):
    demand(int(text) >= 1, "must be 1 or more")
    return int(text)
def counts(text):                       # "16,64" -> (16, 64)
    return tuple(map(count, text.split(",")))
def source(text):                       # a folder is noted with its full path
    demand(text, "must be a folder, or 'synthetic'")
    return text if text == "synthetic" else os.path.realpath(os.path.expanduser(text))
def amount(text):
    demand(0 <= float(text) < math.inf, "must be a number from 0 on")
    return float(text)

@dataclass(frozen=True)
class Settings:
    """What every command can be told."""
    seed: int = 0                       # all randomness follows from it, not the held-out split
    device: str = "auto"                # auto, or a torch device: cpu, cuda:1, mps
    out: str = ""                       # empty: runs/ + vq, ldm, samples; evaluate: --ckpt's folder

    @property
    def folder(self):                   # (evaluate has no kind: it uses this only with --out)
        return Path(self.out or f"runs/{self.kind}").expanduser()

@dataclass(frozen=True)
class VQConfig(Settings):
    """stage 1: train the VQGAN, image -> codes -> image"""
    kind = "vq"                         # no ": type", so no field and no flag
    preset: str = "default"             # tiny: seconds; paper: about the papers' size, for a GPU
    # Which images?
    data: source = "synthetic"          # 'synthetic', or a folder of images; class = its subfolder
    n_images: count = 4096              # how many to draw if synthetic
    size: count = 64                    # side of the square images, in pixels
    # How large?
    widths: counts = (16, 64)           # channels of the DownBlocks; f = 2^(how many)
    z_dim: count = 3                    # d, the length of a code
    codes: count = 2048                 # K, the number of codes
    # What counts how much?
    lpips: str = "auto"                 # LPIPS's net: squeeze, alex, vgg; off; auto: squeeze or off
    lpips_weight: amount = 0.1          # weight of LPIPS, a learnt distance of images
    commit_weight: amount = 0.25        # weight of the commitment loss beside the codebook's
    gan_weight: amount = 0.4            # weight of the GAN, × lam × D's lead (section 7); 0: off
    gan_start: amount = 0.1             # fraction of the run after which the GAN joins
    # How fast, how long?
    lr: amount = 1e-3                   # learning rate of everything that has none of its own
    muon_lr: amount = 0.02              # learning rate of blocks' kernels, by Muon; 0: Adam at --lr
    codes_lr: amount = 0.02             # learning rate of the codes, which must keep up with z
    d_lr: amount = 4e-4                 # learning rate of the discriminator
    batch_size: count = 8               # images in a step, over all processes
    epochs: count = 3                   # passes over the training images
    minutes: amount = 0.0               # if above 0: train for so many minutes instead

    @property
    def side(self):
        """h = w, the side of the latent grid."""
        return self.size // 2 ** len(self.widths)

@dataclass(frozen=True)
class LDMConfig(Settings):
    """stage 2: train the diffusion model on the VQGAN's codes"""
    kind = "ldm"
    preset: str = "default"             # as in train-vq
    # On what?
    vq: str = "runs/vq"                 # run folder or checkpoint of train-vq; its images are used
    balance: bool = False               # draw every class equally often, however rare it is
    # Which diffusion, how large?
    T: count = 1000                     # noise levels
    schedule: str = "cosine"            # how the noise grows with t: linear, cosine
    target: str = "v"                   # the UNet predicts v; or eps, which wants --schedule linear
    widths: counts = (64, 128)          # channels of the UNet's DownBlocks
    # How fast, how long?
    ema: amount = 0.995                 # decay of the running mean of the weights
    lr: amount = 1e-3                   # learning rate
    batch_size: count = 32              # latents in a step, over all processes
    epochs: count = 36                  # passes over the training latents
    minutes: amount = 0.0               # if above 0: train for so many minutes instead

@dataclass(frozen=True)
class SampleConfig(Settings):
    """make new images with a trained stage 2"""
    kind = "samples"
    ckpt: str = "runs/ldm"              # run folder or checkpoint of train-ldm
    n: count = 64                       # how many images, over all classes
    class_: str = ""                    # only this class; empty: all, in turn
    steps: count = 50                   # S, steps from noise to image, at most T
    sampler: str = "ddim"               # ddim, or ddpm, which wants many more steps
    eta: amount = 0.0                   # fresh noise in a ddim step: 0 none … 1 much; ddpm: unused
    guidance: amount = 2.2              # 1: plain; more: more typical, less varied

@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """measure a checkpoint of either stage on images that it never saw"""
    ckpt: str = "runs/ldm"              # run folder or checkpoint of either stage
    data: source = ""                   # folder of other images; empty: unseen ones of its own kind
    n: count = 500                      # how many images, at most, and how many samples

PRESETS = {"default": {},           # a preset is a row of flags; those that you type beat it
    "tiny": {"train-vq": "--size 32 --n-images 200 --widths 16,32 --codes 64 --epochs 2",
             "train-ldm": "--T 200 --widths 32,64 --batch-size 16 --epochs 4"},
    "paper": {"train-vq": "--size 256 --n-images 20000 --widths 128,128,256,256 --z-dim 256 "
              "--codes 1024 --commit-weight 1 --lpips-weight 1 --gan-weight 1 --lr 1e-4 "
              "--muon-lr 0 --codes-lr 5e-4 --d-lr 1e-4 --epochs 40",
              "train-ldm": "--target eps --schedule linear --widths 256,512 --lr 1e-4 "
              "--ema 0.9999 --epochs 200"}}
MAY_CHANGE = {"device", "out", "lpips", "epochs", "minutes"}        # on --resume
# ------------------------------------------------------------------------------------------------
# 2. Device, precision, seeds
# What do we compute on, how many processes are there, and where does randomness come from?

def pick_device(cfg):
    """-> device, and a context (autocast) in which matrix products run in bf16, where supported.
    bf16: 16-bit floats with fp32's range and two or three digits, at twice the speed or more."""
    name = cfg.device
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.zeros(1, device=name).device     # does it work? cuda -> cuda:0
    except Exception:
        raise UserError("--device: cannot be used on this machine; cpu can") from None
    bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":                   # not where bf16 is only emulated: that is slower
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    say("device", device, "in bf16" if bf16 else "in fp32: no bf16 units known")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)

def rng(*key):
    """The random numbers that belong to a key, such as (seed, "turns", step).
    Randomness is looked up, never carried along: step 700 draws the same numbers whether the run
    got there in one go or was killed and resumed; a checkpoint has no random state to forget."""
    return torch.Generator().manual_seed(digest(key))
def digest(key):                        # anything -> 63 bits, the same on every machine
    return random.Random(repr(key)).getrandbits(63)

# torchrun starts this program once for each GPU: world says how many there are, rank which one this
# is. Each takes an equal share of a batch; all_reduce sums gradients, and that sum / world() is the
# gradient of the whole batch. DistributedDataParallel does this too, and hides it.
def world():
    return dist.get_world_size() if dist.is_initialized() else 1
def rank():
    return dist.get_rank() if dist.is_initialized() else 0
def share(batch):                       # this process's rows of a batch
    return batch.chunk(world())[rank()]
def mean_over_processes(x):             # in place: x itself becomes the mean
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x
def average_gradients(net):
    if world() > 1:                     # all in one message: one for each tensor is slower
        grads = [p.grad for p in net.parameters()]
        mean = mean_over_processes(parameters_to_vector(grads))
        vector_to_parameters(mean, grads)       # written back into the tensors .grad themselves

def say(*words):
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))
def bar(items, name, total=None):       # rank > 0: off; 0: on a terminal only
    return tqdm(items, name, total, leave=False, disable=rank() or None)
# ------------------------------------------------------------------------------------------------
# 3. What the loops see of data
# Here the next images are chosen, made floats in [-1,1] and turned: a skin lesion has no up.

def to_float(x):
    """uint8 0…255 -> [-1,1], the range of x everywhere (only x_hat can leave it)."""
    return x.float() / 127.5 - 1
def to_bytes(x):                        # and back, on the CPU
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()

@functools.lru_cache(maxsize=2)         # a batch may lie across the border of two epochs
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=rng(seed, "order", epoch))

def next_rows(n, step, batch_size, seed):
    """Which of 0…n-1 are this step's batch? The next of an endless row of shuffles. (B,)"""
    places = range(step * batch_size, (step + 1) * batch_size)     # place // n: the epoch
    return torch.stack([shuffled(n, seed, place // n)[place % n] for place in places])

def augment(x, turns):
    """Each image (B,C,H,H) in one of the square's eight symmetries, turns (B,) in 0…7."""
    turned = []
    for image, turn in zip(x, turns.tolist()):
        if turn >= 4:
            image = image.flip(2)
        turned.append(image.rot90(turn % 4, (1, 2)))
    return torch.stack(turned)
# ------------------------------------------------------------------------------------------------
# 4. Blocks
# VQGAN and UNet are built from the same bricks. Two things differ: the UNet's ResBlocks hear noise
# level and class (emb), and its UpBlocks see what the DownBlocks had before they halved it (skip).

class Norm(nn.GroupNorm):
    """GroupNorm for any width: brings each group of channels to mean 0 and std 1, then scales and
    shifts each channel as learnt. It looks at each image alone: the batch size changes nothing."""
    def __init__(self, c):
        groups = math.gcd(32, c, c // 4 or 1)   # divides c; at most 32 and c/4 (c < 4: one group)
        super().__init__(groups, c)

def zero(layer):
    """A zeroed layer adds nothing at first: blocks start as their shortcut, the UNet says 0. It
    does learn: its gradient is input times error. The layers before it learn once it is not 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class ResBlock(nn.Module):
    """Norm, SiLU, Conv, twice, plus the shortcut. emb enters as scale and shift of what the
    second norm puts out: AdaGN (Dhariwal & Nichol 2021, arXiv 2105.05233)."""
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
    """Every position looks at every other (VQGAN Table 7); a convolution sees only what is near.
    Linear maps give each a query, a key and a value. The output at a position is the mean of all
    values, weighted by how well their keys fit its query (softmax of q·k/√C, Vaswani 2017). Cost
    grows as (h·w)²: little on 16×16, much on 64×64; so MidBlock only (papers: larger grids too)."""
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
    """Each cell becomes 2×2 copies, the skip's channels come beside them, two ResBlocks follow."""
    def __init__(self, c_in, c_out, emb_dim=None, c_skip=0):
        super().__init__()
        self.res1 = ResBlock(c_in + c_skip, c_out, emb_dim)
        self.res2 = ResBlock(c_out, c_out, emb_dim)

    def forward(self, x, emb=None, skip=None):                            # (B,c_in,h,w)
        # trap: in a transposed convolution even and odd pixels get different sums of weights: a
        # mesh shows in the image (Odena 2016, distill.pub). VQGAN's code doubles cells, too.
        y = F.interpolate(x, scale_factor=2, mode="nearest")              # (B,c_in,2h,2w)
        if skip is not None:
            y = torch.cat([y, skip], dim=1)                               # (B,c_in+c_skip,2h,2w)
        return self.res2(self.res1(y, emb), emb)                          # (B,c_out,2h,2w)

def levels(widths):
    """(c_in, c_out) of each DownBlock: (16, 64) -> (16, 16), (16, 64); for UpBlocks, backwards."""
    return list(zip([widths[0], *widths[:-1]], widths))
# ------------------------------------------------------------------------------------------------
# 5. Stage 1: the VQGAN
# The encoder makes the grid small, the codebook makes it discrete, the decoder undoes both. Why
# discrete? In the VQGAN paper, because its stage 2 predicts code numbers one by one, like words of
# a text. Here, because rounding to the nearest code corrects what stage 2 gets slightly wrong.
# The codebook, K learnt vectors, is delicate: choosing the nearest has no gradient, and a code that
# is never chosen never learns. Watch codes used (%), perplexity (e^entropy: K if all used alike).

class Encoder(nn.Module):
    """x -> z: Conv, m DownBlocks, MidBlock, Norm, SiLU, Conv (VQGAN Table 7)."""
    def __init__(self, widths, z_dim):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        there = levels(widths)                                            # 16 → 16 → 64
        self.down = nn.ModuleList([DownBlock(c_in, c_out) for c_in, c_out in there])
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
    def __init__(self, widths, z_dim):
        super().__init__()
        self.first = nn.Conv2d(z_dim, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1])
        back = reversed(levels(widths))                                   # (out, in): 64 → 16 → 16
        self.up = nn.ModuleList([UpBlock(c_in, c_out) for c_out, c_in in back])
        self.norm = Norm(widths[0])
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q):                                               # (B,d,h,w)
        y = self.mid(self.first(z_q))
        for block in self.up:
            y = block(y)                                                  # the grid doubles m times
        y = F.silu(self.norm(y))
        # Not bf16 (too few digits): adaptive_weight (section 6) divides by this layer's gradient.
        with torch.autocast(y.device.type, enabled=False):
            return self.last(y.float())                                   # (B,3,H,W)

class Codebook(nn.Module):
    """Replaces each vector of z by the nearest of K learned ones (VQ sec. 3.1)."""
    def __init__(self, codes, z_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, z_dim)                       # (K,d)
        self.register_buffer("wins", torch.zeros(codes))      # (K,) wins since the last restart

    def nearest(self, z):                                                 # (B,d,h,w)
        """The nearest code's number: k = argmin_j ‖z - e_j‖ (VQ eq. 1); e_j: row j of embedding."""
        B, d, h, w = z.shape
        # trap: distances computed in bf16 choose many wrong codes; a z rounded to bf16 does little
        # harm. k is an integer: no gradient. Flat, as a batched cdist copies the codebook B times.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z.float(), "B d h w -> (B h w) d")           # (B·N,d)
            distance = torch.cdist(flat, self.embedding.weight)           # (B·N,K)
            k = distance.argmin(dim=1)
        return k.view(B, h, w)                                            # (B,h,w)

    def lookup(self, k):                                                  # (B,h,w)
        """z_q = e_k (VQ eq. 2). rearrange moves nothing in memory; contiguous() does, for speed."""
        return rearrange(self.embedding(k), "B h w d -> B d h w").contiguous()        # (B,d,h,w)

    def forward(self, z):                                                 # (B,d,h,w)
        """-> z_q (which passes its gradient to z), k, codebook loss, commitment loss (VQ eq. 3)."""
        k = self.nearest(z)                                               # (B,h,w)
        z_q = self.lookup(k)                                              # (B,d,h,w)
        # One distance, two losses; sg[] decides who moves:
        #   codebook_loss   the codes, to the vectors that they won       weight 1
        #   commit_loss     the encoder's vectors, to their codes         weight commit_weight: 0.25
        # trap: VQGAN's code has these weights swapped: codebook_loss 0.25 and commit_loss 1. The
        # two losses have the same value, so no curve shows the swap.
        codebook_loss = F.mse_loss(z_q, z.detach())             # ‖sg[z] - e‖², mean over all
        commit_loss = F.mse_loss(z, z_q.detach())               # ‖z - sg[e]‖², likewise
        # Straight through (VQ sec. 3.2): the value is z_q, but the gradient goes to z. Rounding has
        # no slope, so z gets the gradient that the decoder has for z_q, unchanged: a lie, but one
        # that points downhill while z and z_q are close, and the two losses keep them close.
        # trap: if codebook_loss came after this line, from the new z_q, no code would ever learn.
        z_q = z + (z_q - z).detach()
        return z_q, k, codebook_loss, commit_loss

    # trap: the usual start, uniform in ±1/K, puts all codes near the origin. If encoder outputs lie
    # elsewhere, a few codes win everything and the rest never get a gradient: codebook collapse.
    # So codes start on encoder outputs, and unused ones restart there (Jukebox, arXiv 2005.00341).
    @torch.no_grad()
    def restart_unused(self, z, generator):
        """Move codes without a win since the last restart (at first all) to random vectors of z."""
        unused = self.wins == 0                                           # (K,)
        n = int(unused.sum())
        flat = rearrange(z, "B d h w -> (B h w) d")                       # (B·N,d)
        pick = torch.randint(len(flat), (n,), generator=generator)
        apart = torch.randn(n, flat.shape[1], generator=generator).to(z.device)
        apart *= 0.01 * flat.std(0, correction=0)                         # so that no two are alike
        self.embedding.weight[unused] = flat[pick] + apart
        self.wins.zero_()
        if world() > 1:                     # each process has vectors of its own: take the first's
            dist.broadcast(self.embedding.weight.data, 0)

    def count(self, k):
        """Note which codes won. What matters is 0 or not, so a mean over processes will do."""
        wins = torch.bincount(k.flatten(), minlength=len(self.wins)).float()
        self.wins += mean_over_processes(wins)

class VQGAN(nn.Module):
    """Encoder, codebook and decoder, for images in [-1,1] whose sides are multiples of f = 2^m."""
    def __init__(self, widths, z_dim, codes):
        super().__init__()
        self.encoder = Encoder(widths, z_dim)
        self.codebook = Codebook(codes, z_dim)
        self.decoder = Decoder(widths, z_dim)

    def forward(self, x):                                                 # (B,3,H,W)
        """-> x_hat (B,3,H,W), z (B,d,h,w), k (B,h,w), codebook loss, commitment loss."""
        z = self.encoder(x).float()
        z_q, k, codebook_loss, commit_loss = self.codebook(z)
        return self.decoder(z_q), z, k, codebook_loss, commit_loss

    def encode(self, x):
        """x (B,3,H,W) -> code numbers k (B,h,w): all that stage 2 ever sees of an image."""
        return self.codebook.nearest(self.encoder(x))

    def decode(self, z):
        """z (B,d,h,w) -> nearest codes -> x_hat (B,3,H,W).
        trap: the decoder has only ever seen codes, so what stage 2 makes is quantised here."""
        return self.decoder(self.codebook.lookup(self.codebook.nearest(z)))
# ------------------------------------------------------------------------------------------------
# 6. Stage 1: the losses
# The squared error alone gives blur: the mean of all sharp images that fit. LPIPS sends both images
# through a frozen network that was trained to name photographs, and adds up how its feature maps
# differ: blurred hair has other features. What still gives a reconstruction away is left to a
# GAN, two networks that compete: the discriminator D learns to give high numbers (logits) to real
# images, low ones to reconstructions; the VQGAN, the generator, learns to get high ones for them.

def load_lpips(wanted, device):
    """LPIPS (Zhang 2018, arXiv 1801.03924) of the lpips package, for images in [-1,1]; None if off,
    or if auto fails. It is called outside autocast, so never in bf16. trap: if it were part of
    the VQGAN, .train() would switch its dropout on, and checkpoints would carry its weights."""
    if wanted == "off":
        return None
    try:
        warnings.filterwarnings("ignore", module="torchvision")     # advice for lpips, not for us
        import lpips
        net = lpips.LPIPS(net="squeeze" if wanted == "auto" else wanted, verbose=False)
        return net.to(device).eval().requires_grad_(False)
    except Exception as e:              # URLError, OSError, a damaged file, an unknown name
        demand(wanted == "auto", f"--lpips: {e}; choose squeeze, alex, vgg, or off (blurred)")
        say("WARNING no LPIPS:", e, "- its weights belong in", torch.hub.get_dir() + "/checkpoints")

class PatchDiscriminator(nn.Module):
    """D: a logit (high: real) for each place of the latent grid. At f = 4 its kernels span 18×18
    pixels (pix2pix, arXiv 1611.07004: 70×70): enough to judge the grain. No sigmoid at the end:
    hinge_loss wants raw logits. Norm, not the papers' BatchNorm: an image is judged alone."""
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
    """D's loss, from its logits: real ones above 1 and fake ones below -1 cost nothing more. (The
    VQGAN paper, eq. 5, writes a log loss; its authors' code has this one, and so have we.)"""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

def adaptive_weight(rec, adversarial, last):
    """lam = ‖∇_L rec‖ / (‖∇_L adversarial‖ + δ), VQGAN eq. 7; ∇_L: by the last layer's weights (by
    all: too slow). rec: mse + weighted LPIPS. adversarial: -D(x_hat), whose gradient may be a
    thousand times stronger or weaker, and changes as D learns; lam makes both push equally hard."""
    # lam is a constant for backward(). retain_graph: loss.backward() still needs this graph.
    def push(loss):                                         # ‖∇_L loss‖
        (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
        return mean_over_processes(gradient).norm()
    lam = push(rec) / (push(adversarial) + 1e-4)            # δ: push may be ~0 (paper's δ: 1e-6)
    return lam.clamp(max=1e4)                               # δ and cap as in VQGAN's code
# ------------------------------------------------------------------------------------------------
# 7. Stage 1: training
# The generator steps first, then D on the same images. D joins after a tenth of the run: from early
# blobs it would learn only that blur is fake. Watch: mse and lpips fall, codes used and perplexity
# rise. D's mean logits: d_real - d_fake of 0.2 to 0.6 is healthy, above 1 D wins, at 0 it is blind.
# Used before they are shown: Images (B), Run (C), draw_rows (D), reconstruct (E), Muon (F).

def rate(step, progress):
    """Factor of all learning rates: up in 50 steps; in the last 60 % of the run down to 0.01."""
    up = (step + 1) / 50
    down = (1 - progress) / 0.6
    return max(0.01, min(1, up, down))
def set_learning_rate(optimizer, factor):
    for group in optimizer.param_groups:
        initial = group.setdefault("initial_lr", group["lr"])     # noted at the first call
        group["lr"] = factor * initial

def vq_optimizers(vqgan, cfg):
    """-> Adam, Muon. Muon trains the blocks' kernels (F says why; with Adam, mse is 1.5 times as
    large after as many steps), Adam all else, with betas 0.9, 0.99 (VQGAN's code: 0.5, 0.9)."""
    enc, dec = vqgan.encoder, vqgan.decoder
    blocks = nn.ModuleList([enc.down, enc.mid, dec.mid, dec.up])
    kernels = [p for p in blocks.parameters() if p.dim() == 4] if cfg.muon_lr > 0 else []
    codes = vqgan.codebook.embedding.weight
    rest = [p for p in vqgan.parameters() if p not in {codes, *kernels}]  # compared as objects
    # Only codebook_loss trains codes, and Adam divides by a gradient's usual size: a weight on that
    # loss would change little. To keep up with z, codes need their own rate (Łańcucki 2005.08520).
    groups = [{"params": rest}, {"params": [codes], "lr": cfg.codes_lr}]
    adam = torch.optim.Adam(groups, cfg.lr, betas=(0.9, 0.99), fused=True)
    return adam, Muon(kernels, cfg.muon_lr)

def train_vq(cfg, state=None):
    """Stage 1, from images to a checkpoint. state: one to go on from. -> exit status."""
    unit = 4 * 2 ** len(cfg.widths)             # 4·f: the UNet's default halves the grid twice
    demand(cfg.size >= 32 and cfg.size % unit == 0, f"--size: from 32 on, a multiple of {unit}")
    device, mixed = pick_device(cfg)
    images = Images(cfg.data, cfg, cfg.folder.parent / "cache")   # its train, val: row numbers
    lpips = load_lpips(cfg.lpips, device)
    cfg = replace(cfg, lpips=lpips.pnet_type if lpips else "off")   # --resume keeps what auto found
    n = len(images.train)
    torch.manual_seed(cfg.seed)                 # the first weights
    vqgan = VQGAN(cfg.widths, cfg.z_dim, cfg.codes).to(device)
    disc = PatchDiscriminator(cfg.widths).to(device)
    adam, muon = vq_optimizers(vqgan, cfg)
    adam_d = torch.optim.Adam(disc.parameters(), cfg.d_lr, betas=(0.5, 0.9), fused=True)
    parts = {"model": vqgan, "disc": disc, "adam": adam, "muon": muon, "adam_d": adam_d}
    run = Run(cfg, n, parts, facts={}, state=state)     # yields steps, logs, says when to look
    if not state:
        label = images.labels[images.train]
        preview = {images.classes[i]: images.rows(images.train[label == i][:16])
                   for i in label.unique()[:16]}
        draw_rows(cfg.folder / "data_preview.png", preview)
        with torch.no_grad():                   # the codes start on encoder outputs
            some = images.rows(images.train[shuffled(n, cfg.seed, 0)[:64]])     # 64 at random
            z = vqgan.encoder(to_float(some).to(device))
            vqgan.codebook.restart_unused(z, rng(cfg.seed, "first codes"))

    for step in run:
        for optimizer in (adam, muon, adam_d):
            set_learning_rate(optimizer, rate(step, run.progress))
        rows = images.train[next_rows(n, step, cfg.batch_size, cfg.seed)]                 # (B,)
        turns = torch.randint(8, (cfg.batch_size,), generator=rng(cfg.seed, "turns", step))
        x = to_float(images.rows(share(rows)))
        x = augment(x, share(turns)).to(device)                               # (B,3,H,W) in [-1,1]

        # ---- the generator: encoder, codebook, decoder ----
        with mixed:
            x_hat, z, k, codebook_loss, commit_loss = vqgan(x)
        mse = F.mse_loss(x_hat, x)
        losses = {"mse": mse, "codebook": codebook_loss}
        rec = mse                                       # VQGAN's code: L1, not mse
        if lpips:
            losses["lpips"] = lpips(x_hat, x).mean()
            rec = rec + cfg.lpips_weight * losses["lpips"]
        loss = rec + codebook_loss + cfg.commit_weight * commit_loss   # VQGAN eq. 4, VQ eq. 3

        gan_on = cfg.gan_weight > 0 and run.progress >= cfg.gan_start
        if gan_on:
            with mixed:
                real, fake = disc(x), disc(x_hat)
            adversarial = -fake.mean()          # D is fooled if its logits are high (VQGAN's code)
            lam = adaptive_weight(rec, adversarial, vqgan.decoder.last.weight)
            # ours: D's lead, how well it tells real from fake, is a factor. A blind D's gradient is
            # meaningless; lam would amplify it, x_hat would jump about, and D could never catch up.
            gap = (real.mean() - fake.mean()).detach()
            lead = mean_over_processes(gap).clamp(0, 1)
            loss = loss + cfg.gan_weight * lead * lam * adversarial           # VQGAN eq. 6

        vqgan.zero_grad()
        loss.backward()
        average_gradients(vqgan)
        norm = clip_grad_norm_(vqgan.parameters(), 1.0)  # so no wild batch rules the running means
        if run.skips(norm):             # not finite; one bad batch must not end a night
            continue
        adam.step()
        muon.step()
        vqgan.codebook.count(k)
        if step % 50 == 49:
            vqgan.codebook.restart_unused(z, rng(cfg.seed, "restart", step))

        # ---- the discriminator, on the same images ----
        if gan_on:
            with mixed:
                # trap: detach! D's loss must not reach the VQGAN. D(x_hat) is computed anew, since
                # loss.backward() freed its graph. D(x)'s is still there: loss took only its value.
                fake = disc(x_hat.detach())
            d_loss = hinge_loss(real, fake)
            # trap: the generator's backward left gradients in D; not zeroed, they push D(fake) up.
            disc.zero_grad()
            d_loss.backward()
            average_gradients(disc)
            norm = clip_grad_norm_(disc.parameters(), 1.0)
            if norm.isfinite():
                adam_d.step()
            losses.update(lam=lam, d_loss=d_loss, d_real=real.mean(), d_fake=fake.mean())

        # ---- tell; at a look (each tenth of the run, each ten minutes): measure, draw, save ----
        run.tell(losses)
        if run.look_due():
            some = images.rows(images.val[:256])                              # never trained on
            held, copies = reconstruct(vqgan, some, lpips, mixed)             # measures, x_hats
            draw_rows(run.picture("recon"), {"original": some, "reconstruction": copies})
            run.tell_look(held)

    if not lpips:
        say("trained WITHOUT LPIPS")
    return run.finish("next: python vqldm.py train-ldm --vq")
# ------------------------------------------------------------------------------------------------
# 8. Stage 2: diffusion
# Noise is added to a latent in T small steps until nothing is left of it; a network learns to say
# what was added; sampling walks back. Levels t count from 0, and level 0 has some noise already.
# So z0, the clean one, is not z_t at t = 0: it is level -1. With normal noise ε:
#   one step further     z_t = √α_t z_(t-1) + √β_t ε     α_t + β_t = 1: so variance 1 stays 1
#   all steps at once    z_t = √ᾱ_t z0 + √(1-ᾱ_t) ε      ᾱ_t = α_0 · … · α_t, z0's share of variance
#     (put z_(t-1) in: old noise, now of variance α_t (1-ᾱ_(t-1)), plus new, β_t: 1-ᾱ_t in all)
#   the network answers  ε, or v = √ᾱ_t ε - √(1-ᾱ_t) z0
#   predict()            turns either answer into two guesses, z0_hat and eps_hat
#   one step back        is made from these, by ddim or by ddpm
# Why many steps, if the first already gives z0_hat? In much noise many z0 fit, and the best answer
# by squared error is their mean, a blur. So we go a little way towards it and ask again: fewer fit.
# Why v? In much noise ε is nearly z_t itself, so a good guess of ε says little about z0; v is then
# ≈ -z0. In little noise v is ≈ ε. So v is always what z_t hides.

class Diffusion:
    """A noise schedule, the loss of DDPM (Algorithm 1) and two samplers (Algorithm 2, DDIM)."""
    def __init__(self, T=1000, schedule="cosine", target="v"):
        demand(target in ("v", "eps"), "--target: must be v or eps")  # another: edit goal, predict
        self.T, self.target = T, target
        if schedule == "linear":
            # trap: 1e-4 and 0.02 belong to T = 1000. Unscaled, T = 50 ends at ᾱ = 0.60, and
            # sampling starts from a noise that the network never saw.
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        elif schedule == "cosine":              # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
            part = torch.arange(T + 1, dtype=torch.float64) / T              # 0…1
            # curve / its start: ᾱ. It falls more evenly: linear's last third is nearly all noise.
            # Without 0.008, level 0 (of 1000) has 17 times less noise variance: too little to see.
            curve = torch.cos((part + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - curve[1:] / curve[:-1]       # 1 - α; α: the quotient of neighbouring ᾱ
        else:
            raise UserError("--schedule: must be linear or cosine")
        alpha = 1 - beta.clamp(max=0.999)           # β = 1: ᾱ = 0, and predict() may divide by √ᾱ
        alpha_bar = alpha.cumprod(0)                # in float64: rounded once, not T times
        # A 1 is appended: alpha_bar[-1] belongs to z0 itself, level -1, where sampling ends.
        self.alpha_bar = F.pad(alpha_bar, (0, 1), value=1).float()            # (T+1,)

    def alpha_bar_at(self, t, z):
        """ᾱ_t, called a from here on (alpha is α), shaped to multiply z; t: (B,) or one number."""
        a = self.alpha_bar.to(z.device)[t]                                    # (B,)
        return a.view(-1, 1, 1, 1)                                        # (B,1,1,1); one t: B = 1

    def add_noise(self, z0, t, eps):                                          # (B,d,h,w), (B,)
        """DDPM eq. 4: z_t = √ᾱ z0 + √(1-ᾱ) ε, all steps at once; the variances add up to 1."""
        a = self.alpha_bar_at(t, z0)
        return a.sqrt() * z0 + (1 - a).sqrt() * eps                           # (B,d,h,w)

    def goal(self, z0, eps, a):
        """What the network should answer."""
        if self.target == "eps":
            return eps
        return a.sqrt() * eps - (1 - a).sqrt() * z0     # Salimans app. D: v = √ᾱ ε - √(1-ᾱ) z0

    def predict(self, out, z_t, t):
        """The network's answer -> (z0_hat, eps_hat), both (B,d,h,w).
        trap: with ε, z0_hat gets the network's error times √(1-ᾱ)/√ᾱ: 157 (linear) or 20,291
        (cosine) at t = 999: colours off, latents of std 2 and more. With v, no factor is above 1.
        trap: z0_hat clipped to ±1, as for pixels, has std 0.7; z0 has std 1 and goes beyond ±1."""
        a = self.alpha_bar_at(t, z_t)
        if self.target == "eps":                    # DDPM eq. 4, solved for z0
            return (z_t - (1 - a).sqrt() * out) / a.sqrt(), out
        # √ᾱ = cos φ, √(1-ᾱ) = sin φ: (z_t, v) is (z0, ε) turned by -φ. So turn (z_t, v) by φ:
        z0_hat = a.sqrt() * z_t - (1 - a).sqrt() * out                        # Salimans app. D
        eps_hat = (1 - a).sqrt() * z_t + a.sqrt() * out
        return z0_hat, eps_hat

    def loss(self, net, z0, t, eps, label):
        """Algorithm 1 (ε: DDPM eq. 14) -> (B,): mean of (goal - net(z_t, t))², ~1 if net says 0."""
        out = net(self.add_noise(z0, t, eps), t, label)
        goal = self.goal(z0, eps, self.alpha_bar_at(t, z0))
        return F.mse_loss(out, goal, reduction="none").flatten(1).mean(1)     # (B,)

    def weight(self, t):
        """How much level t (B,) counts in training v: 1 in the middle (ᾱ = 1/2), 1/4 at both ends.
        In little noise v's error hardly matters: z0_hat has it times √(1-ᾱ), nearly 0, and rounding
        to a code removes the rest. In much noise v ≈ -z0, of which z_t shows nearly nothing: the
        error stays near 1, whatever is learnt. So both ends count less than the middle, but not 0.
        (With cosine, all but the floor is Kingma & Gao's sigmoid weight of shift 0, 2303.00848.)"""
        a = self.alpha_bar.to(t.device)[t]
        if self.target != "v":                      # eps: all equal, as in DDPM
            return torch.ones_like(a)
        return (4 * a * (1 - a)).sqrt().clamp(min=0.25)                       # (B,)

    def pairs(self, steps):
        """Exactly `steps` pairs (t, t_prev: where the step ends), T-1 down to -1; 1 <= steps <= T.
        ours: step i = 0…S-1 starts at t ≈ T-1 - T (i/S)². T = 1000, S = 4: 999, 937, 749, 437.
        Short strides in much noise: with cosine, shapes arise there. (DDIM: equal or long there.)
        trap: range(0, T, T // steps) can give too many: 1000 levels for 600 steps of T = 1000."""
        ts = []
        for i in range(steps + 1):                              # i = S: all T passed, so t = -1
            passed = max(i, round(self.T * (i / steps) ** 2))   # max: 1 level a step at least
            ts.append(self.T - 1 - passed)
        return list(zip(ts, ts[1:]))                            # each with the next

    @torch.no_grad()
    def sample(self, net, z, steps, sampler, eta, noise):
        """Walk back from z, standard normal (B,d,h,w). net(z_t, t) answers, noise() draws numbers
        like z. Yields (z at its new level, z0_hat) after each step; the last z is the sample."""
        for t, t_prev in self.pairs(steps):
            a = self.alpha_bar_at(t, z)
            a_prev = self.alpha_bar_at(t_prev, z)
            # trap: ᾱ is a product, so the α of this whole stride is ᾱ_t / ᾱ_prev. With the trained
            # α_t, of one level, ddpm takes too little away in each step and ends in noise.
            alpha = a / a_prev
            t_all = torch.full((len(z),), t, device=z.device)                 # (B,)
            z0_hat, eps_hat = self.predict(net(z, t_all), z, t_all)

            if sampler == "ddim":
                # z0_hat is noised again, up to level t_prev: variance 1-ᾱ_prev. σ² of it is fresh,
                # the rest eps_hat, the noise found. η = 0: none is fresh, the first z decides all.
                # η = 1: since z_t = √α z_prev + √(1-α) ε, a part (1-α)/(1-ᾱ) of z_t's noise came in
                # between t_prev and t. As large a part of 1-ᾱ_prev is fresh (as in DDPM eq. 7).
                newer = (1 - alpha) / (1 - a)
                sigma = eta * ((1 - a_prev) * newer).sqrt()               # DDIM eq. 16
                rest = (1 - a_prev - sigma**2).clamp(min=0).sqrt()
                z = a_prev.sqrt() * z0_hat + rest * eps_hat               # DDIM eq. 12, its α is ᾱ
            elif sampler == "ddpm":
                # DDPM Algorithm 2, line 4. Its mean is ddim's with η = 1 (to check: z0_hat there is
                # (z - √(1-ᾱ) eps_hat)/√ᾱ, rest √α (1-ᾱ_prev)/√(1-ᾱ)); its σ² is larger (sec. 3.2).
                sigma = (1 - alpha).sqrt()
                z = (z - (1 - alpha) / (1 - a).sqrt() * eps_hat) / alpha.sqrt()
            else:
                raise UserError("--sampler: must be ddim or ddpm")

            # trap: noise after the last step leaves a grain in every sample.
            if t_prev >= 0:
                z = z + sigma * noise()
            yield z, z0_hat
# ------------------------------------------------------------------------------------------------
# 9. Stage 2: the UNet
# The same bricks as the VQGAN. New are time (how noisy is z_t?) and class, heard by every ResBlock,
# and the skips, which carry what no bottleneck can: the noise, independent at each place.

def time_embedding(t, dim):
    """t (B,) -> (B,dim): sines and cosines of growing period (Vaswani 2017, arXiv 1706.03762). Fast
    ones tell neighbouring levels apart, slow ones distant ones; in t itself 500 is nearly 501."""
    frequency = 10_000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))   # (dim/2,)
    angle = t.float()[:, None] * frequency                                # (B,dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                   # (B,dim)

class UNet(nn.Module):
    """(z_t, t, class) -> v or ε. Classes are 0…n_classes-1; n_classes itself means: not told, as
    for one latent in ten of training (section 10). guided, below, needs such answers, too."""
    def __init__(self, z_dim, widths, n_classes):
        super().__init__()
        E = 4 * widths[0]
        self.n_classes = n_classes
        self.time = nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, E))
        self.label = nn.Embedding(n_classes + 1, E)
        self.first = nn.Conv2d(z_dim, widths[0], 3, padding=1)
        there = levels(widths)                                            # 64 → 64 → 128
        self.down = nn.ModuleList([DownBlock(c_in, c_out, E) for c_in, c_out in there])
        self.mid = MidBlock(widths[-1], E)
        # Each UpBlock mirrors a DownBlock, so (out, in) again. The skip (DDPM: one per ResBlock)
        # has as many channels as what comes from below: 128 + 128 → 64, then 64 + 64 → 64.
        back = reversed(there)
        self.up = nn.ModuleList([UpBlock(c_in, c_out, E, c_skip=c_in) for c_out, c_in in back])
        self.norm = Norm(widths[0])
        self.last = zero(nn.Conv2d(widths[0], z_dim, 3, padding=1))

    def forward(self, z_t, t, label=None):                                # (B,d,h,w), (B,), (B,)
        if label is None:
            label = torch.full_like(t, self.n_classes)
        emb = self.time(time_embedding(t, self.label.embedding_dim))      # (B,E)
        emb = emb + self.label(label)       # so the class reaches each block with the time
        y = self.first(z_t)
        skips = []
        for block in self.down:
            y, skip = block(y, emb)                                       # the grid halves
            skips.append(skip)
        y = self.mid(y, emb)
        for block in self.up:
            y = block(y, emb, skips.pop())                                # the grid doubles
        return self.last(F.silu(self.norm(y))).float()                    # (B,d,h,w)

def guided(net, guide, label, w, below):
    """-> a net(z_t, t) that is led towards its class by classifier-free guidance (CFG eq. 6):
        out = weak + w (strong - weak)    w: --guidance. strong is told the class, weak is not
    w = 1 is strong alone; a larger w goes further in the direction in which the class pulls. (CFG's
    own w is this w minus 1.) At t >= below (walk: ᾱ < 0.1) there is no guidance: in much noise it
    would cost variety (Kynkäänniemi 2024, arXiv 2404.07724, has none in little noise either).
    ours: weak has two faults. It is not told the class (as in CFG): so w leads towards the class.
    And it is `guide`, the running mean as it was after a fifth of the run: it errs where strong
    does, but more: w leads away from errors, too (Karras 2406.02507's weak: young, small, told)."""
    def answer(z_t, t):
        strong = net(z_t, t, label)
        if w == 1 or t[0] >= below:         # here all t are equal
            return strong
        weak = guide(z_t, t)
        return weak + w * (strong - weak)
    return answer
# ------------------------------------------------------------------------------------------------
# 10. Stage 2: training
# The frozen encoder turns each image into its grid of code numbers, once: these are stage 2's data
# (fast, but without augment). The latents are codes, exactly what the decoder reads (LDM takes z
# before quantisation; codes: Nguyen 2024, 2410.14758). Diffusion ends in noise of mean 0 and std 1,
# so the codes are given these, too. Look at samples: even a perfect net's loss stays far above 0.
# Used before they are shown: load_vqgan and LatentDiffusion (11), load_checkpoint (C).

def encode_images(vqgan, images, device, mixed):
    """All images -> their code numbers (n,h,w): 4 MB for 4,096 images in 16×16 codes."""
    grids = []
    for rows in bar(torch.arange(len(images.names)).split(16), "encoding"):
        with mixed:
            k = vqgan.encode(to_float(images.rows(rows)).to(device))      # (16,h,w)
        grids.append(k.int().cpu())
    return torch.cat(grids)

def frequencies(k, codes):
    """How often each code stands in the grids k. -> (K,), sum 1."""
    return torch.bincount(k.flatten(), minlength=codes) / k.numel()

def measure_scale(k, e):
    """Mean and std of the codes e (K,d), weighted by how often they stand in the grids k. -> (2,d).
    By channel, as Karras 2024 (2312.02696). LDM app. G divides by one std and subtracts no mean."""
    p = frequencies(k, len(e)).to(e)[:, None]                             # (K,1)
    mean = (p * e).sum(0)
    variance = (p * (e - mean) ** 2).sum(0)
    return torch.stack([mean, variance.clamp(min=1e-12).sqrt()])

def standardise(z, scale):
    """z (B,d,h,w) -> z0; unstandardise goes back. Nothing else uses this scale.
    trap: a std copied from another model, or unstandardise forgotten: wrong colours, contrast."""
    mean, std = scale.view(2, -1, 1, 1)                                   # (d,1,1) each
    return (z - mean) / std
def unstandardise(z0, scale):
    mean, std = scale.view(2, -1, 1, 1)
    return z0 * std + mean

@torch.no_grad()
def update_ema(ema, net, step, decay):
    """The running mean of the weights, for sampling: ema <- decay·ema + (1-decay)·net. Steps jump
    about the goal, as no two batches are alike; the mean lies closer to it. trap: with a decay
    of 0.9999 from the first step on, 1,000 steps keep 90 % first weights: samples are noise."""
    decay = min(decay, (1 + step) / (10 + step))        # 0.1 at step 0, 0.9 at 80, 0.99 at 890
    for mean, p in zip(ema.parameters(), net.parameters()):
        mean.lerp_(p, 1 - decay)

def look_ldm(model, z0, label, path):
    """Held-out loss of a LatentDiffusion, 16 samples to path; the same noise at each look."""
    t = (torch.arange(len(z0), device=z0.device) * model.cfg.T) // len(z0)  # (n,) evenly spaced
    eps = torch.randn(z0.shape, generator=rng("held-out noise")).to(z0.device)
    with model.mixed:
        loss = model.diffusion.loss(model.net, z0, t, eps, label.to(z0.device))           # (n,)
    classes = model.trained[(torch.arange(16) * len(model.trained)) // 16]    # evenly spread
    pictures, latents = model.images(SampleConfig(), range(16), classes)
    draw_rows(path, {"samples": pictures})
    return {"loss": float(loss.mean()), "latent_std": float(latents.std())}

def train_ldm(cfg, state=None):
    """Stage 2, from a stage-1 checkpoint to one that holds both (see facts). -> exit status."""
    diffusion = Diffusion(cfg.T, cfg.schedule, cfg.target)
    device, mixed = pick_device(cfg)
    vq = state.get("vq") if state else load_checkpoint(cfg.vq, "--vq", "vq")
    vqgan, vq_cfg = load_vqgan(vq, device)
    side = vq_cfg.side
    demand(side % 2 ** len(cfg.widths) == 0, "--widths: the codes' grid cannot be halved so often")
    images = Images(vq_cfg.data, vq_cfg, cfg.folder.parent / "cache")
    demand(not state or state.get("classes") == images.classes, "--resume: other classes now")
    grids = encode_images(vqgan, images, device, mixed)                   # (images,h,w)
    scale = measure_scale(grids[images.train], vqgan.codebook.embedding.weight)           # (2,d)
    n, n_classes = len(images.train), len(images.classes)
    class_counts = torch.bincount(images.labels[images.train], minlength=n_classes)
    def latents(rows):                            # (B,) -> k (B,h,w) -> z_q -> z0 (B,d,h,w)
        return standardise(vqgan.codebook.lookup(grids[rows].to(device)), scale)

    torch.manual_seed(cfg.seed)                 # the first weights
    net = UNet(vq_cfg.z_dim, cfg.widths, n_classes).to(device)
    ema = deepcopy(net).requires_grad_(False)
    guide = deepcopy(ema)                  # the younger self, see guided
    adam = torch.optim.Adam(net.parameters(), cfg.lr, betas=(0.9, 0.99), fused=True)
    parts = {"model": net, "ema": ema, "guide": guide, "adam": adam}
    facts = {"scale": scale.cpu(), "classes": images.classes, "class_counts": class_counts,
             "vq": {"config": vq["config"], "model": vq["model"]}}
    run = Run(cfg, n, parts, facts, state)

    for step in run:
        set_learning_rate(adam, rate(step, run.progress))
        draw = rng(cfg.seed, "step", step)
        chosen = next_rows(n, step, cfg.batch_size, cfg.seed)                 # (B,)
        if cfg.balance:
            p = 1 / class_counts[images.labels[images.train]]             # (n,) up to a factor
            chosen = p.multinomial(cfg.batch_size, replacement=True, generator=draw)      # instead
        rows = images.train[chosen]                                           # (B,)
        # trap: 0…T-2 leaves pure noise, where sampling starts, untrained; 1…T-1 the cleanest level.
        t = torch.randint(cfg.T, (cfg.batch_size,), generator=draw)           # (B,) in 0…T-1
        eps = torch.randn(cfg.batch_size, vq_cfg.z_dim, side, side, generator=draw)
        hidden = torch.rand(cfg.batch_size, generator=draw) < 0.1       # (B,) untold, as in guided
        label = images.labels[rows].masked_fill(hidden, n_classes)            # (B,)
        z0 = latents(share(rows))                                             # (B,d,h,w)
        t, eps, label = [share(x).to(device) for x in (t, eps, label)]

        with mixed:
            loss = diffusion.loss(net, z0, t, eps, label)                     # (B,) Algorithm 1
        net.zero_grad()
        weighted = (loss * diffusion.weight(t)).mean()
        weighted.backward()
        average_gradients(net)
        norm = clip_grad_norm_(net.parameters(), 1.0)
        if run.skips(norm):
            continue
        adam.step()
        update_ema(ema, net, step, cfg.ema)
        if run.progress < 0.2:                  # after that no more copies: it stays young
            guide.load_state_dict(ema.state_dict())

        # ---- tell, measure, draw, save ----
        run.tell({"loss": loss.mean()})         # without the weight: 1 = nothing learnt
        if run.look_due():
            model = LatentDiffusion(run.checkpoint(), device, mixed)
            some = images.val[:256]
            held = look_ldm(model, latents(some), images.labels[some], run.picture("samples"))
            run.tell_look(held)

    return run.finish("next: python vqldm.py sample --ckpt")
# ------------------------------------------------------------------------------------------------
# 11. Sampling
# Walk back from noise in S steps, unstandardise, decode. A stage-2 checkpoint holds its VQGAN, too.
# Used before they are shown: load_checkpoint, reading (C), draw_rows, draw_trajectory (D).

def frozen(net, weights, device):                       # in eval mode, without gradients
    net.load_state_dict(weights)
    return net.to(device).eval().requires_grad_(False)
def load_vqgan(state, device):                          # -> VQGAN of a checkpoint, its settings
    with reading("the VQGAN"):                          # what fails in here is told as a sentence
        cfg = VQConfig(**state["config"])
        vqgan = VQGAN(cfg.widths, cfg.z_dim, cfg.codes)
        return frozen(vqgan, state["model"], device), cfg

class LatentDiffusion:
    """All that makes images: UNet (running mean), guide, Diffusion, VQGAN, scale, classes, and how
    many images of each class were trained on (evaluate makes samples in that proportion)."""
    def __init__(self, state, device, mixed):
        self.device, self.mixed = device, mixed
        self.vqgan, self.vq_cfg = load_vqgan(state.get("vq"), device)
        with reading("the UNet"):
            self.cfg = LDMConfig(**state["config"])
            self.diffusion = Diffusion(self.cfg.T, self.cfg.schedule, self.cfg.target)
            self.classes, self.class_counts = state["classes"], state["class_counts"].float()
            self.trained = self.class_counts.nonzero().flatten()    # classes that training saw
            self.scale = state["scale"].view(2, self.vq_cfg.z_dim).to(device)     # (2,d)
            net = UNet(self.vq_cfg.z_dim, self.cfg.widths, len(self.classes))
            self.guide = frozen(deepcopy(net), state["guide"], device)
            self.net = frozen(net, state["ema"], device)

    def noise(self, seed, numbers):
        """A function that draws the next noise (B,d,h,w); image i has the same in any batch."""
        own = [rng(seed, "sample", i) for i in numbers]
        shape = self.vq_cfg.z_dim, self.vq_cfg.side, self.vq_cfg.side
        def draw():
            return torch.stack([torch.randn(shape, generator=g) for g in own]).to(self.device)
        return draw

    def walk(self, cfg, numbers, label):
        """Yields (z at its new level, z0_hat) after each step; iterate over it inside `mixed`."""
        draw = self.noise(cfg.seed, numbers)
        below = (self.diffusion.alpha_bar >= 0.1).sum() - 1     # so many levels; -1: not z0's own
        net = guided(self.net, self.guide, label.to(self.device), cfg.guidance, below)
        steps = min(cfg.steps, self.cfg.T)
        return self.diffusion.sample(net, draw(), steps, cfg.sampler, cfg.eta, draw)

    def decode(self, z0):
        """Latents z0 (B,d,h,w) -> uint8 images (B,3,H,W)."""
        with self.mixed:
            return to_bytes(self.vqgan.decode(unstandardise(z0, self.scale)))

    def images(self, cfg, numbers, label):
        """-> uint8 images (n,3,H,W), their latents z0 (n,d,h,w), on the CPU."""
        pictures, latents = [], []
        for i in bar(range(0, len(label), 32), "sampling"):
            batch = slice(i, i + 32)
            with self.mixed:
                for z_t, _ in self.walk(cfg, numbers[batch], label[batch]):
                    z0 = z_t                            # only the last one is kept
            pictures.append(self.decode(z0))
            latents.append(z0.cpu())
        return torch.cat(pictures), torch.cat(latents)

def sample(cfg):
    """New images as PNGs in a folder for each class, grid.png, trajectory.png."""
    state = load_checkpoint(cfg.ckpt, "--ckpt", "ldm")
    demand(not any(cfg.folder.glob("*")), f"--out {cfg.folder}: is not empty; name a new folder")
    model = LatentDiffusion(state, *pick_device(cfg))
    classes = model.trained
    if cfg.class_:
        demand(cfg.class_ in model.classes, f"--class: must be one of {model.classes}")
        classes = torch.tensor([model.classes.index(cfg.class_)])
    label = classes[torch.arange(cfg.n) % len(classes)]                   # (n,) each in turn
    pictures, latents = model.images(cfg, range(cfg.n), label)
    for i, image in enumerate(pictures):
        folder = cfg.folder / re.sub(r"[^\w ,+-]", "_", model.classes[label[i]])
        folder.mkdir(parents=True, exist_ok=True)
        write_png(image, f"{folder}/{i:05d}.png")
    rows = {model.classes[c]: pictures[label == c] for c in label.unique()}
    draw_rows(cfg.folder / "grid.png", rows)
    draw_trajectory(cfg.folder / "trajectory.png", model, cfg, label[:1])
    say(f"latents have std {latents.std():.2f} (healthy: 1); look at", cfg.folder / "grid.png")
# ------------------------------------------------------------------------------------------------
# A. Drawn lesions
# Images to begin with, without a download. (They are cached: after a change here clear runs/cache.)

LESIONS = {             # colours; border: ragged, soft; pigment network (<0: pale); chance of dots
    "keratosis-like": ("b89970 997a57 ccb894 8c7866", .09, .08, .05, .6),
    "melanoma-like": ("42261c 734a33 545c78 8c4545", .20, .12, .20, .5),
    "nevus-like": ("854f38 9e6647 613829 ad6b57", .04, .17, .24, .25),
    "vascular-like": ("a81f2e 851433 c23d42 661f47", .04, .08, -.22, 0)}
SKIN = "edbda8 e69e99 ccadb2 e8c294 d699a3"

def synthetic(i, size, seed=0):
    """Draw image i of the endless set `seed`: uint8 (3,size,size). The classes take turns."""
    tape = rng(seed, "lesion", i)
    colours, ragged, soft, network, dots = list(LESIONS.values())[i % len(LESIONS)]

    def span(lo, hi, *shape):                       # the next random numbers, uniform in lo…hi
        return lo + (hi - lo) * torch.rand(shape, generator=tape)
    def noise(cells, channels=1):       # a grid of random numbers in about -1…1, smoothly enlarged
        coarse = span(-1, 1, 1, channels, cells, cells)
        return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0]
    def distance(n, reach):             # of each pixel, at x, y below, to n random points (n,H,W)
        at = span(-reach, reach, 2, n, 1, 1)
        return torch.hypot(x - at[0], y - at[1])
    def mixture(colours, logits):                   # logits (n,H,W) of n colours -> (3,H,W)
        rgb = torch.tensor(list(bytes.fromhex(colours))).view(-1, 3) / 255              # (n,3)
        rgb += span(-.05, .05, len(rgb), 1)             # each a little lighter or darker
        return torch.einsum("nhw,nc->chw", logits.softmax(0), rgb)

    # A plane that is a little bent: nothing in it is quite straight or round.
    axis = torch.linspace(-1, 1, size)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))        # (2,H,W)
    x, y = plane + .15 * noise(4, 2) + .03 * noise(10, 2)                 # (H,W) each

    # Skin: 5 tones, each of weight 0…6 + clouds of ±1; by softmax one mostly wins; then a grain.
    image = mixture(SKIN, span(0, 6, 5, 1, 1) + noise(3, 5)) + .03 * noise(24)

    # Border: a circle, more or less ragged.
    radius = span(.30, .56) + 2 * ragged * noise(6)[0]
    lesion = torch.sigmoid(5 / soft * (radius - torch.hypot(x, y)))       # (H,W), 1 inside

    # Colour: patches of the class's four colours; the more ragged, the sharper their borders.
    body = mixture(colours, (3 + 40 * ragged) * noise(4, 4)) + .05 * noise(16)

    # Texture: 40 random points; a wall where a pixel's two nearest are about equally far from it.
    first, second = distance(40, .8).topk(2, dim=0, largest=False).values
    wall = torch.exp(-((second - first) / (2.4 / size + .03)) ** 2)       # (H,W), 1 on it
    body = body * (1 - network * wall)
    spots = torch.sigmoid((span(.01, .08, 9, 1, 1) - distance(9, .4)) * size)     # (9,H,W)
    spots = spots * (span(0, 1, 9, 1, 1) < dots)    # up to nine dots, each there with chance dots
    body = body * (1 - .8 * spots.amax(0))
    image = torch.lerp(image, body, lesion * span(.85, 1))      # skin + weight · (body - skin)

    # Hairs on 3 of 10 images. along, across: x, y turned; shift, width, start, darkness: random.
    if span(0, 1) < .3:
        for _ in range(int(span(2, 10))):
            turn = span(0, 6.3)
            along = x * turn.cos() + y * turn.sin()
            across = y * turn.cos() - x * turn.sin() + span(-.8, .8)
            hair = torch.sigmoid((span(.006, .014) - across.abs()) * size)      # 1 on the line
            hair = hair * (along > span(-1.5, 0))           # which begins in the image or before it
            image = image * (1 - span(.6, .9) * hair)       # dark, where it is

    # On some, the dark round edge of the dermatoscope.
    if span(0, 1) < .18:
        inside = torch.sigmoid((span(.9, 1.05) - plane.norm(dim=0)) * size / 2.4)
        image = image * inside
    return torch.round(255 * image.clamp(0, 1)).byte()
# ------------------------------------------------------------------------------------------------
# B. A folder of images
# One bad image can end a run after hours, and decoding JPEGs would take most of a laptop's time.
# So each image is opened once, before training, and its pixels are written into one file.

PHOTO = r"(?i).*\.(bmp|gif|jpe?g|png|tiff?|webp)$"      # but no masks, no pictures of a run:
NO_PHOTO = (r"(?i)(_seg|_superpixels|_expert|-partial)[^/]*$|[_-]mask\.\w+$|(^|/)(masks|runs)/"
            r"|(^|/)(grid|trajectory|curves|evaluate|data_preview|\w+_epoch_[\d.]+)\.png$")
HELD_OUT = r"(?i)(?<![^/])(val(id(ation)?)?|test(ing)?)/"   # (?<![^/]): at the start or after a /
# Folders that are no class are cut out of a path: nevus/train/1.jpg is of class nevus.
NO_CLASS = HELD_OUT + r"|(?<![^/])(train(ing)?|(HAM10000_)?images(_part_\d)?)/"

def read_image(path, size):                             # -> uint8 (3,size,size)
    # PIL ignores the suffix: it would open 40 kinds of files, and start Ghostscript for one kind.
    with Image.open(path, formats=["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]) as im:
        im.draft("RGB", (size, size))           # JPEG at 1/2, 1/4 or 1/8 of its size: faster
        demand(im.mode != "F", "pixels are floats: save them in 8 or 16 bits")
        im = ImageOps.exif_transpose(im)        # cameras store "turn me" beside the pixels
        if im.mode[0] == "I":                   # of 16 bits: PIL would clip at 255, to white
            im = Image.fromarray((np.asarray(im) // 257).astype(np.uint8))      # 65535 = 255·257
        # The middle square, scaled, on white: what a transparent part hides is often junk.
        im = ImageOps.fit(im.convert("RGBA"), (size, size))
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return np.asarray(im.convert("RGB")).transpose(2, 0, 1)

def find_images(folder):
    """-> name, class, lot and modification time of each photograph under a folder.
    The class is the innermost folder's name (NO_CLASS cut out), else what a table says. The lot, a
    number, decides: if it ends in 0, the image is held out. With folders val or test the lot is 0
    there and 1 elsewhere. Without: a hash of lesion_id or, if that is unknown, of the file's name.
    trap: in a split by photograph, the network is measured on lesions seen in other photographs."""
    table, named, hashed, known = {}, [], [], 0
    # tables there or beside it, m…a in the name: metadata.csv, HAM10000_metadata.csv, manifest.csv
    for path in [*folder.parent.glob("*[mM]*a*.csv"), *folder.glob("*[mM]*a*.csv")]:
        with suppress(csv.Error, OSError):
            for row in csv.DictReader(path.open(encoding="utf-8-sig", errors="replace")):
                stem = row.get("isic_id") or row.get("image_id")
                filled = {column: word for column, word in row.items() if word}
                table.setdefault(stem, {}).update(filled)           # tables add to each other
    everything = glob.glob("**", root_dir=folder, recursive=True)     # links too, nothing hidden
    for path in sorted(folder / name for name in everything):
        name = path.relative_to(folder).as_posix()
        if re.match(PHOTO, name) and not re.search(NO_PHOTO, name) and path.is_file():
            row = table.get(path.stem, {})
            known += bool(row)
            told = row.get("diagnosis_3") or row.get("diagnosis_1") or row.get("dx") or "images"
            kind = Path(re.sub(NO_CLASS, "", name)).parent.name or told
            lesion = row.get("lesion_id") or path.stem
            stamp = path.stat().st_mtime_ns     # of what a link points to
            held = re.search(HELD_OUT, name)
            named.append((name, kind, 0 if held else 1, stamp))
            hashed.append((name, kind, digest(lesion), stamp))
    say("images named in a table of classes or lesions:", known)
    return named if 0 in [lot for _, _, lot, _ in named] else hashed    # 0: a folder val or test

class Images:
    """Images at --size, drawn or decoded once, then read from the cache. labels: the class number
    of each. train, val: the row numbers of those to train on and of those held out."""
    def __init__(self, source, cfg, cache):
        folder = Path(source)
        if source == "synthetic":
            kinds = list(LESIONS)
            # name, class, lot (a tenth of each class ends in 0), seed (goes into the cache's name)
            found = [(i, kinds[i % len(kinds)], i // 4, cfg.seed) for i in range(cfg.n_images)]
            def read(i):
                return synthetic(i, cfg.size, cfg.seed).numpy()
        else:
            found = find_images(folder)
            def read(name):
                return read_image(folder / name, cfg.size)
        demand(found, f"--data {source}: no images there; name another folder, or put a link there")
        self.size = cfg.size
        self.path = cache / f"{folder.name}-{self.size}-{digest((folder, found)):x}.u8"
        index = self.path.with_suffix(".pt")
        if not index.exists():                  # written last: where it is, all pixels are
            good = fill_cache(self.path, found, read)
            write_whole(index, lambda f: torch.save(good, f))
        self.names, kinds, lots, _ = zip(*torch.load(index))     # rows -> columns
        self.classes = sorted(set(kinds))
        self.labels = torch.tensor([self.classes.index(kind) for kind in kinds])
        last = torch.tensor(lots) % 10
        held = (last == last.min())             # ends in 0; if none does: in the smallest digit
        self.train = (~held).nonzero().flatten()
        val = held.nonzero().flatten()          # in a folder the first are of one class: mix
        self.val = val[torch.randperm(len(val), generator=rng("held out"))]
        say("data", source, len(self.names), "of", len(found), "images:", *self.classes)

    def rows(self, rows):
        """uint8 (B,3,H,W). Opened anew each time: what an open memmap has read stays in memory."""
        pixels = np.memmap(self.path, np.uint8, "r").reshape(-1, 3, self.size, self.size)
        return torch.from_numpy(pixels[rows.numpy()])

def fill_cache(path, found, read):                      # all into one file -> the good ones
    bad = {}
    def attempt(row):
        try:
            return read(row[0]).tobytes()
        except Exception as e:                  # PIL raises nearly anything on a broken file
            bad[row[0]] = repr(e)               # not e: its traceback holds the image
            return b""
    def write(f):
        with ThreadPoolExecutor() as pool:      # Ctrl-C: map() drops what still waits
            for image in bar(pool.map(attempt, found), "preparing images", len(found)):
                f.write(image)
        if bad:
            say("skipped", len(bad), "images that cannot be read:", *list(bad.items())[:5])
        demand(len(bad) <= 0.2 * len(found), "--data: that is more than a fifth of all images")
    write_whole(path, write)
    return [row for row in found if row[0] not in bad]
# ------------------------------------------------------------------------------------------------
# C. Keeping a run
# A night of training is lost in three ways: a checkpoint half written when the power went, a resume
# that restores the weights but not the rest, settings that silently differ.

def write_whole(path, write):           # all or nothing: a file beside it, flushed to disk, renamed
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".*{path.suffix}.[0-9]*.tmp"):     # a killed run's, a day old
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 86_400:
                old.unlink()
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        for _ in range(20):
            with suppress(PermissionError):     # Windows refuses while somebody reads the old one
                return os.replace(tmp, path)    # done
            time.sleep(0.1)
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
    """The checkpoint, or last.pt of a run folder -> its dict. name: the flag that asked for it.
    trap: weights_only=False, the default before torch 2.6, runs any code in the file."""
    path = Path(where).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    demand(path.is_file(), f"{name} {where}: no checkpoint is there")
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        kind = state["kind"]
    demand(kind in kinds, f"{name} {where}: is of the other stage")
    return {**state, "folder": path.parent}

def open_run(cfg, typed, resume, overwrite):
    """-> a run's settings, the checkpoint to go on from or None. typed: what the user gave."""
    last = cfg.folder / "last.pt"
    if overwrite or not (resume or last.exists()):
        return cfg, None
    demand(resume, f"--out {cfg.folder}: already holds a run; --resume or --overwrite it")
    state = load_checkpoint(last, "--resume", cfg.kind)
    with reading(last):
        old = type(cfg)(**state["config"])
    differ = [f"{flag(name)} was {getattr(old, name)}" for name, value in typed.items()
              if name not in MAY_CHANGE and value != getattr(old, name)]
    demand(not differ, f"--resume goes on with the recorded settings: {differ}")
    if "epochs" in typed:               # drops recorded --minutes: from here now() is step/steps;
        old = replace(old, minutes=0.0)     # if that is less than before, learning rates rise
    typed["out"] = cfg.out                              # where it lies now: it may have moved
    return replace(old, **typed), state

class Run:
    """A training run: yields steps until --epochs, --minutes or a signal ends it; logs and saves.
    parts: networks and optimisers; facts: what else sampling needs; state: a checkpoint to go on
    from. step: steps begun. progress: now(), averaged over processes. status: 128+signal."""
    def __init__(self, cfg, n, parts, facts, state):
        demand(n, "--data: no images to train on, all are held out")
        demand(cfg.batch_size % world() == 0, "--batch-size: no multiple of torchrun's processes")
        self.cfg, self.parts, self.facts = cfg, parts, facts
        self.step = self.bad = self.looks = self.status = 0     # bad: skipped steps in a row
        self.log = []
        self.began = time.perf_counter()
        if state:
            with reading("last.pt"):
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.step, self.log = state["step"], state["log"]
                self.began -= state["seconds"]
        elif (cfg.folder / "last.pt").exists():         # overwritten: what it showed must go, too
            for own in "*_epoch_[0-9]*.png", "curves.png", "evaluate.png", "metrics.json":
                for old in cfg.folder.glob(own):
                    old.unlink(missing_ok=True)         # another process may be faster
        self.steps_per_epoch = n / cfg.batch_size
        self.steps = math.ceil(cfg.epochs * n / cfg.batch_size)
        self.look_due()             # sets self.looks, so that a resumed run repeats none
        weights = len(parameters_to_vector(parts["model"].parameters()))
        say(f"{weights:,} weights, {n} images to train on, from step {self.step}")

    def seconds(self):
        return time.perf_counter() - self.began
    def now(self):                                      # the part done
        if self.cfg.minutes:
            return self.seconds() / 60 / self.cfg.minutes
        return self.step / self.steps
    def picture(self, name):                            # where to draw what is seen at this look
        epoch = self.step / self.steps_per_epoch
        return self.cfg.folder / f"{name}_epoch_{epoch:06.2f}.png"

    def __iter__(self):
        # Ctrl-C and SIGTERM only ask: the step is finished and saved. A second Ctrl-C ends at once.
        def ask(number, frame):
            self.status = 128 + number
            signal(SIGINT, SIG_DFL)             # not SIGTERM: torchrun may send several
        signal(SIGINT, ask)
        signal(SIGTERM, ask)
        if not self.log:                        # new; if it cannot be saved, fail before the work
            self.save()
        left = None if self.cfg.minutes else self.steps - self.step
        with bar(None, "training", left) as self.line:
            while self.time_left():
                self.step += 1
                yield self.step - 1
                self.line.update()

    def time_left(self):
        # A signal's status is >= 130: averaged over up to 130 processes it alone is >= 1. All end.
        now = torch.tensor(self.now() + self.status, dtype=torch.float64)
        self.progress = float(mean_over_processes(now))
        return self.progress < 1

    def look_due(self):     # looks: tenths done + ten-minute spans passed; if it grew, one is due
        before = self.looks
        self.looks = int(10 * self.now()) + self.seconds() // 600
        return self.looks > before and rank() == 0

    def skips(self, norm):                              # -> bad steps in a row, 0: go on
        self.bad = 0 if norm.isfinite() else self.bad + 1
        if self.bad:
            say("WARNING step", self.step, "is skipped: its gradient is not finite")
        demand(self.bad < 5, "five such steps in a row: start anew with a lower --lr")
        return self.bad

    def tell(self, losses):                             # every tenth step
        if self.step % 10 == 0:
            row = {name: float(mean_over_processes(value.detach()))
                   for name, value in losses.items()}
            self.log.append({"step": self.step, **row})
            self.line.set_postfix(row)

    def tell_look(self, held):                          # and save
        row = {f"held_{name}": value for name, value in held.items()}
        self.log.append({"step": self.step, **row})
        words = [f"{name} {value:.4g}" for name, value in held.items()]
        say(f"{min(1, self.now()):4.0%} held out:", *words)
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
        with suppress(PermissionError):         # Excel locks a table that it shows: then not now
            with open(self.cfg.folder / "log.csv", "w", newline="") as f:
                table = csv.DictWriter(f, names)
                table.writeheader()
                table.writerows(self.log)
        if self.log:
            draw_curves(self.cfg.folder / "curves.png", self.log, names[1:])

    def finish(self, then):                             # -> exit status
        self.save()
        mean_over_processes(torch.zeros(1))             # a barrier: all wait for that save
        then = "to go on, add --resume; it lies in" if self.status else then
        say("saved at step", self.step, "--", then, shlex.quote(self.cfg.folder.as_posix()))
        return self.status
# ------------------------------------------------------------------------------------------------
# D. Pictures

@contextmanager
def figure(path, width, rows):                          # with figure(…) as axes: draw on them
    from matplotlib.figure import Figure                # not pyplot: needs no window
    fig = Figure(figsize=(width, 1.3 * rows), layout="constrained")
    yield fig.subplots(rows, squeeze=False).flatten()
    write_whole(path, lambda f: fig.savefig(f, format="png"))

def draw_rows(path, rows):                              # {label: uint8 images}: a strip each, ≤ 16
    columns = min(16, max(map(len, rows.values())))
    with figure(path, columns, len(rows)) as axes:
        for ax, (label, images) in zip(axes, rows.items()):
            strip = make_grid(images[:16], columns, pad_value=255)
            ax.imshow(strip.permute(1, 2, 0).numpy())
            ax.set_title(label, fontsize=9, loc="left", parse_math=False)
            ax.axis("off")

def draw_curves(path, log, names):                      # a panel for each column of the log
    with figure(path, 8, len(names)) as axes:
        for ax, name in zip(axes, names):
            rows = [row for row in log if name in row]
            ax.plot([row["step"] for row in rows], [row[name] for row in rows])
            ax.set_title(name, fontsize=9)

def draw_trajectory(path, model, cfg, label):           # from noise to one image, in 8 frames
    with model.mixed:
        guesses = [z0_hat for _, z0_hat in model.walk(cfg, [0], label)]
    moments = torch.linspace(0, len(guesses) - 1, 8).long()
    film = model.decode(torch.cat(guesses)[moments])                      # (8,3,H,W)
    draw_rows(path, {"the guess of z0 on the way from noise": film})
# ------------------------------------------------------------------------------------------------
# E. Measuring
# A kernel distance means something only beside its references (see evaluate). It and LPIPS
# use the network of stage 1's default loss, so they flatter models trained with it.

def compare(x_hat, x, lpips):                           # (B,3,H,W) in [-1,1], twice
    """-> {name: (B,)}. One more measure is one more line here. (SSIM would want (x + 1) / 2.)"""
    mse = F.mse_loss(x_hat, x, reduction="none").mean((1, 2, 3))
    numbers = {"mse": mse, "psnr": 10 * torch.log10(4 / mse.clamp(min=1e-10))}  # dB: range²/error
    if lpips:
        numbers["lpips"] = lpips(x_hat, x).flatten()
    return numbers

@torch.no_grad()
def reconstruct(vqgan, images, lpips, mixed):
    """uint8 (n,3,H,W) -> numbers by name, reconstructions."""
    e = vqgan.codebook.embedding.weight
    numbers, grids, copies = {}, [], []
    for part in images.split(16):
        x = to_float(part).to(e.device)
        with mixed:
            k = vqgan.encode(x)                                           # (B,h,w)
            x_hat = vqgan.decoder(vqgan.codebook.lookup(k)).clamp(-1, 1)
        for name, value in compare(x_hat, x, lpips).items():
            numbers[name] = numbers.get(name, 0) + float(value.sum()) / len(images)
        grids.append(k.cpu())
        copies.append(to_bytes(x_hat))
    p = frequencies(torch.cat(grids), len(e))                             # (K,)
    entropy = -torch.xlogy(p, p).sum()
    numbers["codes_used_percent"] = 100 * int((p > 0).sum()) / len(p)
    numbers["perplexity"] = float(entropy.exp())                          # 1 … K
    return numbers, torch.cat(copies)

def features(lpips, images):
    """uint8 (n,3,H,W) -> (n,512): last map of LPIPS's network at 224×224, averaged over places."""
    found = []
    for part in images.split(32):
        x = to_float(part).to(lpips.scaling_layer.shift.device)
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        last = lpips.net(lpips.scaling_layer(x))[-1]        # of the maps of all layers
        found.append(last.mean((2, 3)))
    return torch.cat(found).cpu().double()

def kernel_distance(a, b):
    """How far apart two sets of n features lie: squared MMD (KID, 1801.01401, has another net). A
    kernel, (u·v/512 + 1)³, says how alike two features are. The distance is its mean over the pairs
    within a, plus that within b, minus twice that across: 0 on average for two sets of one kind."""
    def kernel(u, v):                                                     # (n,n)
        return (u @ v.T / u.shape[1] + 1) ** 3
    pairs = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    # One sum for all three. No diagonal: not a[i] with itself, nor with b[i], maybe its copy.
    return float((pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1)))

def unseen_images(cfg, vq_cfg, cache):                  # -> two sets of uint8 (n,3,H,W)
    data = cfg.data or vq_cfg.data
    overlap = Path(vq_cfg.data) in Path(data).parents or Path(data) in Path(vq_cfg.data).parents
    demand(not overlap, "--data: contains the training folder, or lies in it; omit --data")
    # Another folder: all of it. The one trained on: its val. Drawn: another seed's, n for each set.
    fresh = replace(vq_cfg, seed=vq_cfg.seed + 1, n_images=2 * cfg.n)
    images = Images(data, fresh, cache)
    rows = torch.randperm(len(images.names), generator=rng(cfg.seed, "unseen"))
    if data == vq_cfg.data and data != "synthetic":
        rows = images.val
    n = min(cfg.n, len(rows) // 2)
    demand(n > 1, "--n, --data: too few unseen images to measure on")
    return images.rows(rows[:2 * n]).split(n)

def evaluate(cfg):                                      # -> metrics.json, evaluate.png
    state = load_checkpoint(cfg.ckpt, "--ckpt", "ldm", "vq")
    folder = cfg.folder if cfg.out else state["folder"]
    device, mixed = pick_device(cfg)
    lpips = load_lpips("auto", device)
    vqgan, vq_cfg = load_vqgan(state.get("vq", state), device)
    real, other = unseen_images(cfg, vq_cfg, folder.parent / "cache")
    numbers, recon = reconstruct(vqgan, real, lpips, mixed)
    pictures = {"real": real, "recon": recon}
    if state["kind"] == "ldm":
        model = LatentDiffusion(state, device, mixed)
        label = model.class_counts.multinomial(len(real), True, generator=rng(cfg.seed, "classes"))
        made, z0 = model.images(SampleConfig(seed=cfg.seed), range(len(real)), label)
        pictures["samples"] = made
        if lpips:
            sets = {            # each against real; other: a second set of unseen images
                "kernel": made,
                "kernel_perfect": reconstruct(vqgan, other, None, mixed)[1],    # a perfect stage 2
                "kernel_recon": recon,                      # stage 1 on the same images
                "kernel_real": other}                       # no model: what chance alone makes
            a = features(lpips, real)
            for name, images in sets.items():
                numbers[name] = kernel_distance(a, features(lpips, images))
        numbers["latent_std"] = float(z0.std())
    numbers["n"] = len(real)
    for name, value in numbers.items():
        say(f"{name:20}{value:10.4g}")
    draw_rows(folder / "evaluate.png", pictures)
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=1))
# ------------------------------------------------------------------------------------------------
# F. Muon
# A matrix is a sum of directions u vᵀ, each with a strength s (the SVD). In a kernel's gradient, as
# a matrix (c_out, rest), a few directions far outweigh the others, which with Adam hardly learn: it
# evens out the sizes of entries. Muon (kellerjordan.github.io/posts/muon) evens out the strengths.

def orthogonal(g):
    """g (r,n) = U S Vᵀ -> about U Vᵀ: g's singular values, but for the tiniest, become 0.7 to 1.2.
    Newton-Schulz needs no SVD: since x xᵀ x = U S³ Vᵀ, sums of odd powers change S alone. A round
    takes each s to 3.4445 s - 4.775 s³ + 2.0315 s⁵ (Jordan): small ones grow, most end near 1."""
    x = g / (g.norm() + 1e-7)                           # norm: √ of the sum of all s². So all s ≤ 1
    for _ in range(5):
        gram = x @ x.T                                                    # (r,r)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x

class Muon(torch.optim.Optimizer):
    """Steps of lr · orthogonal(running mean of the gradient): Jordan's rule, for kernels."""
    def __init__(self, kernels, lr):
        super().__init__([{"params": kernels}], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.05)
                g = p.grad.lerp(mean, 0.95).flatten(1)      # Nesterov: p.grad counts nearly twice
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
    """Each field of the command's settings becomes a flag; the comment at its line is its help."""
    parser = Parser(prog=f"vqldm.py {command}", description=cls.__doc__, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)       # what is not typed has no value
    text = getsource(Settings) + getsource(cls)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)", text, re.MULTILINE))
    for f in fields(cls):
        how = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag(f.name), dest=f.name,
                            help=f"{comments[f.name]} [{f.default}]", **how)
    if command.startswith("train"):
        mode = parser.add_mutually_exclusive_group()
        mode.add_argument("--resume", action="store_true", help="go on with the run in --out")
        mode.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return parser

def run_command(argv):                                  # -> exit status; None is 0
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        say(__doc__, "\nCOMMAND --help lists the settings of any of the four")
        return
    demand(command in COMMANDS, f"{command}: no command; there are {list(COMMANDS)}")
    cls, function = COMMANDS[command]
    parser = build_parser(command, cls)
    typed = vars(parser.parse_args(rest))
    resume = typed.pop("resume", False)
    overwrite = typed.pop("overwrite", False)
    preset = typed.get("preset", "default")
    demand(preset in PRESETS, f"--preset: must be one of {list(PRESETS)}")
    words = PRESETS[preset].get(command, "").split()
    given = {**vars(parser.parse_args(words)), **typed}         # what was typed beats the preset
    cfg = cls(**given)
    if command.startswith("train"):
        return function(*open_run(cfg, typed, resume, overwrite))
    return function(cfg)

def main(argv):
    """Run one command. SystemExit 2: user's mistake, full disk or memory; 130, 143: a signal."""
    if dist.is_torchelastic_launched():                 # by torchrun; gloo for CPUs, nccl for GPUs
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with suppress(AttributeError):                      # a notebook's stdout cannot do this
        # For consoles that lack é; and so that lines sent to a file appear at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    status = 2
    try:
        status = run_command(argv)
    except UserError as e:
        print("vqldm:", e, file=sys.stderr)
    except KeyboardInterrupt:               # while preparing or sampling
        status = 130
    except (MemoryError, OSError, RuntimeError) as e:
        cause = e.__context__ or e      # torch.save's own error has the disk's as its context
        if re.search("out of memory|allocate|MemoryError", repr(e)):
            cause = "out of memory: a smaller --batch-size (or stage 1's --size) helps"
        elif not isinstance(cause, OSError):
            raise
        print("vqldm:", cause, file=sys.stderr)
    finally:
        signal(SIGINT, default_int_handler)     # as before a training, for notebooks
        signal(SIGTERM, SIG_DFL)
    if status:
        raise SystemExit(status)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main(sys.argv[1:])
