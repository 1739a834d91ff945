#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""vqldm: VQGAN + latent diffusion in one file, from pixels to new images.

Stage 1 (the VQGAN) learns to squeeze an image into a small grid of codes and back. Stage 2 (latent
diffusion) learns to make new grids out of noise, which the VQGAN's decoder turns into images. The
second stage works on few numbers, and that is why all of this fits on a laptop.

  x ────E────► z ───nearest code───► z_q ────D────► x_hat         stage 1: VQGAN      (train-vq)
  (B,3,H,W)    (B,d,h,w)  │          (B,d,h,w)      (B,3,H,W)
                          └► k (B,h,w) in 0…K-1                   h = H/f, w = W/f, f = 2^m
  z0 = (z-mean)/std ──noise──► z_t ──UNet(z_t,t)──► eps or v      stage 2: diffusion  (train-ldm)
  image ◄──D── z_q ◄─nearest─ z ◄─·std+mean─ z0 ◄─t = T-1…0─ noise                    (sample)

Letters   B batch · H W pixels · h w latent grid · d length of a code · K codes · N = h·w tokens
          C channels · T diffusion steps · S sampling steps · E length of the time embedding
          x image in [-1,1] · x_hat its reconstruction · z latent · z_q its code · k its number
          z0 standardised latent (DDPM's x_0) · z_t the same at noise level t in 0…T-1
          eps noise · eps_hat its estimate · lam adaptive weight λ · D discriminator; above: decoder
          in equations: n fresh noise, sigma its size · w guidance (else grid width) · sg[] detach
          out the network's answer, eps_hat or v_hat · guide the same network when younger (EMA)

Equations (in the code each stands as its bare number. VQ: van den Oord 2017, arXiv 1711.00937.
          VQGAN: Esser 2021, 2012.09841. DDPM: Ho 2020, 2006.11239. DDIM: Song 2021, 2010.02502.
          LDM: Rombach 2022, 2112.10752. v: Salimans & Ho 2022, 2202.00512. CFG: Ho & Salimans
          2022, 2207.12598. Guide: Karras 2024, 2406.02507. DPM: Lu 2022, 2211.01095. Each ‖ ‖² is
          a mean over all numbers here.)
  (1)  k = argmin_j ‖z - e_j‖,  z_q = e_k                                             VQ eq. 1, 2
  (2)  the value of z_q with the gradient of z: straight through                      VQ sec. 3.2
  (3)  codebook ‖sg[z] - z_q‖²        (4)  commitment ‖sg[z_q] - z‖²                  VQ eq. 3
  (5)  ‖x - x_hat‖² + LPIPS + (3) + (4) + lam L_GAN, each times its --…-weight        VQGAN eq. 4-6
  (6)  lam = ‖∇_L L_rec‖ / (‖∇_L L_GAN‖ + δ),  L the decoder's last layer             VQGAN eq. 7
       L_rec: the first two of (5); δ = 1e-4; lam at most 1e4
  (7)  hinge: D minimises ½ relu(1 - D(x)) + ½ relu(1 + D(x_hat)), L_GAN = -D(x_hat)
  (8)  beta_t new noise at t, alpha_t = 1 - beta_t, alpha_bar_t = alpha_0 · … · alpha_t  DDPM eq. 4
  (9)  z_t = √alpha_bar_t z0 + √(1 - alpha_bar_t) eps                                 DDPM eq. 4
  (10) ‖eps - eps_hat(z_t, t)‖², t uniform: Algorithm 1                   DDPM eq. 14, LDM eq. 2
  (11) z_{t-1} = (z_t - (1-alpha_t)/√(1-alpha_bar_t) eps_hat) / √alpha_t + sigma_t n  Algorithm 2
  (12) v = √alpha_bar eps - √(1-alpha_bar) z0,  z0 = √alpha_bar z_t - √(1-alpha_bar) v   v app. D
  (13) z_prev = √alpha_bar_prev z0_hat + √(1-alpha_bar_prev-sigma²) eps_hat + sigma n DDIM eq. 12
  (14) out = guide(no class) + w · (out(class) - guide(no class)), where t < guide-below · T
       CFG eq. 6 (our w: theirs + 1), but for the guide, which is of Karras 2024
  (15) weight of t in training: 2 √(alpha_bar_t (1 - alpha_bar_t)), at least 1/4   by trial (README)
  (16) in (13) z0_hat + s/(2 s') (z0_hat - z0_hat') for z0_hat, and eps_hat of it by (9)  DPM Alg. 2
       ': one step before; s: growth of ½ log(alpha_bar / (1 - alpha_bar)) in the step

Contents  1. Settings                  5. Blocks                    9. Stage 1: training
          2. Machine                   6. Stage 1: the VQGAN       10. Stage 2: diffusion
          3. Synthetic lesions         7. Stage 1: the losses      11. Stage 2: the UNet
          4. A folder of images        8. Keeping a run            12. Stage 2: training
          13. Pictures and samples    14. Measuring, commands      On a first reading skip 3, 4, 8.

Run it    python vqldm.py train-vq, then train-ldm, then sample; demo does the three in a row.
          grep -n trap: vqldm.py     shows what everybody gets wrong, at the line where it happens.
"""
import argparse
import difflib
import math
import os
import sys
from dataclasses import asdict, dataclass, field, fields, replace

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------
# Every number that you can change is one line here: name, type, default, help, what is allowed. The
# flags, --help, the checks and the checkpoint are made from these lines, so they cannot disagree.
# Who wins: default < --preset < recorded in the checkpoint (on --resume) < typed. This section runs
# before torch is imported (0.1 s instead of 2 s): --help and mistakes are answered at once.

class UserError(Exception):
    """Something that only the user can put right: printed as one sentence, exit status 2."""

def opt(default, help, lo=None, hi=None, choices=None, free=False):
    """One setting. lo, hi: smallest and largest value allowed. free: may change on --resume."""
    return field(default=default,
                 metadata=dict(help=help, lo=lo, hi=hi, choices=choices, free=free))

@dataclass(frozen=True)
class Machine:
    """Settings of every command."""
    seed: int = opt(0, "random seed; every random number is a function of it", 0, 2**31 - 1)
    device: str = opt("auto", "auto (cuda, mps or cpu), or a torch device: cuda:1", free=True)
    precision: str = opt("auto", "numbers in matrix products; auto: bf16 where that is faster",
                         choices=("auto", "fp32", "bf16"), free=True)
    cache: str = opt("runs/cache", "folder of decoded images and latents; deletable", free=True)
    allow_bad: bool = opt(False, "go on with more than 20 % unreadable images", free=True)
    overwrite: bool = opt(False, "replace what is already in the --out folder", free=True)

    def check(self):
        """Raise UserError on combinations that cannot work."""

@dataclass(frozen=True)
class Training(Machine):
    """Settings of both training commands."""
    preset: str = opt("default", "default: laptop; tiny: seconds; report: 256x256, for a GPU",
                      choices=("default", "tiny", "report"))
    resume: bool = opt(False, "go on with the run in --out where it was stopped", free=True)
    minutes: float = opt(0.0, "stop after so many minutes, saved; 0: all epochs", 0, 1e6, free=True)
    warmup: int = opt(50, "steps over which the learning rate rises from 0", 0, 10**6)
    decay: float = opt(0.6, "last fraction of the run, in which the learning rate falls", 0, 1)
    clip: float = opt(1.0, "longest gradient; longer ones are scaled down", 1e-6, 1e9)
    compile: bool = opt(False, "torch.compile the network: slow to start, for GPUs", free=True)

@dataclass(frozen=True)
class VQConfig(Training):
    """stage 1: train the VQGAN, image -> codes -> image"""
    data: str = opt("synthetic", "'synthetic' or a folder of images; class = its subfolder")
    out: str = opt("runs/vq", "folder for checkpoints, log and pictures", free=True)
    size: int = opt(64, "side of the square images, in pixels", 8, 4096)
    n_images: int = opt(4096, "images to draw if the data is synthetic", 8, 10**9)
    held_out: float = opt(0.1, "fraction of the images to measure on, never trained on", 0.001, 0.9)
    widths: tuple[int, ...] = opt((16, 64), "channels of the DownBlocks; f = 2^(how many)", 1, 4096)
    heads: int = opt(1, "attention heads; must divide the last width", 1, 256)
    z_dim: int = opt(3, "d, the length of a code", 1, 1024)
    codes: int = opt(2048, "K, the number of codes", 2, 2**20)
    codebook_weight: float = opt(1.0, "weight of the codebook loss (3)", 0, 1e4)
    commit_weight: float = opt(0.25, "weight of the commitment loss (4)", 0, 1e4)
    revive_every: int = opt(50, "steps between two revivals of unused codes", 1, 10**6)
    perceptual_weight: float = opt(0.1, "weight of LPIPS", 0, 1e4)
    lpips: str = opt("auto", "network of LPIPS; auto: squeeze if its weights can be had",
                     choices=("auto", "off", "squeeze", "alex", "vgg"))
    gan_weight: float = opt(0.5, "weight of the adversarial loss, beside lam; 0: no GAN", 0, 1e4)
    gan_start: float = opt(8.0, "epochs until the generator hears of D; shorter: no GAN", 0, 1e6)
    gan_ramp: float = opt(1.0, "epochs over which that loss rises to its full weight", 0, 1e6)
    d_warmup: float = opt(0.5, "epochs for which D trains unheard before gan_start", 0, 1e6)
    d_widths: tuple[int, ...] = opt((32, 64, 128), "channels of the layers of D", 1, 4096)
    d_lr: float = opt(4e-4, "learning rate of D", 1e-9, 1)
    lr: float = opt(1e-3, "learning rate, never scaled by batch size or processes", 1e-9, 1)
    muon_lr: float = opt(0.02, "rate of inner kernels, by Muon (section 5); 0: Adam, --lr", 0, 1)
    codes_lr: float = opt(2e-2, "learning rate of the codes, which must keep up with z", 1e-9, 1)
    batch_size: int = opt(8, "images in a step, over all processes", 2, 2**20)
    epochs: int = opt(3, "passes over the training images", 1, 10**6, free=True)

    @property
    def f(self):        # derived: numbers that must agree are one number
        return 2 ** len(self.widths)

    def check(self):
        if self.size % self.f or self.size < 2 * self.f:
            raise UserError(f"--size {self.size}: must be a multiple of f = {self.f}, 2 to "
                            f"the number of --widths, and at least {2 * self.f}")
        if self.widths[-1] % self.heads:
            raise UserError(f"--heads {self.heads}: must divide the last width, {self.widths[-1]}")
        if self.size < 2 ** len(self.d_widths):
            raise UserError(f"--d-widths: {len(self.d_widths)} of them halve the image too often; "
                            f"--size {self.size} allows {int(math.log2(self.size))}")

@dataclass(frozen=True)
class LDMConfig(Training):
    """stage 2: train the diffusion model on the VQGAN's latents"""
    vq: str = opt("runs/vq", "run folder or checkpoint of train-vq")
    data: str = opt("", "'synthetic' or a folder; empty: what the VQGAN was trained on")
    out: str = opt("runs/ldm", "folder for checkpoints, log and pictures", free=True)
    views: int = opt(1, "how many of the square's 8 symmetries of an image to cache", 1, 8)
    T: int = opt(1000, "diffusion steps", 10, 10**5)
    schedule: str = opt("cosine", "how the noise grows with t", choices=("linear", "cosine"))
    target: str = opt("v", "what the UNet predicts: v (12), or the noise eps (10)",
                      choices=("v", "eps"))
    unet_widths: tuple[int, ...] = opt((64, 128), "channels of the UNet's DownBlocks", 1, 4096)
    heads: int = opt(1, "attention heads; must divide the last of --unet-widths", 1, 256)
    class_cond: bool = opt(True, "tell the UNet the class; no effect where there is only one")
    label_drop: float = opt(0.1, "fraction of labels hidden in training, for guidance", 0.01, 1)
    guide_age: float = opt(0.2, "the guide (14) is the running mean after this part of the run",
                           0.001, 1)
    balance: bool = opt(False, "draw each class equally often, however rare it is")
    weighting: str = opt("middle", "which t count most in training: the middle (15), or all alike",
                         choices=("middle", "alike"))
    ema: float = opt(0.995, "decay of the running mean of the weights, used to sample", 0, 0.99999)
    lr: float = opt(1e-3, "learning rate, never scaled by batch size or processes", 1e-9, 1)
    muon_lr: float = opt(0.0, "as in train-vq; 0: Adam, as good in the same minutes here", 0, 1)
    batch_size: int = opt(32, "latents in a step, over all processes", 1, 2**20)
    epochs: int = opt(30, "passes over the training latents", 1, 10**6, free=True)

    def check(self):
        if self.unet_widths[-1] % self.heads:
            raise UserError(f"--heads {self.heads}: must divide the last of --unet-widths")

@dataclass(frozen=True)
class Sampling(Machine):
    """Settings of the commands that sample."""
    ckpt: str = opt("runs/ldm", "run folder or checkpoint of train-ldm; evaluate: or of train-vq")
    steps: int = opt(25, "S, steps from noise to image, at most T", 1, 10**5)
    sampler: str = opt("dpm", "dpm (16); ddim (13) wants twice as many steps, ddpm (11) many more",
                       choices=("dpm", "ddim", "ddpm"))
    eta: float = opt(0.0, "fresh noise in a step of ddim: 0 none, 1 as in DDPM", 0, 1)
    guidance: float = opt(2.0, "w of (14): 1 plain, more: more typical; 0: no class", 0, 100)
    guide_below: float = opt(0.8, "guide where t is below this part of T: above, it costs variety",
                             0, 1)

    def check(self):
        if self.eta and self.sampler != "ddim":
            raise UserError(f"--eta {self.eta:g}: belongs to --sampler ddim")

@dataclass(frozen=True)
class SampleConfig(Sampling):
    """make new images with a trained stage 2"""
    out: str = opt("runs/samples", "folder for the pictures")
    n: int = opt(64, "number of images; of each class with --class", 1, 10**7)
    class_: str = opt("", "a class, several by comma, or all: a folder for each")
    trajectory: bool = opt(True, "also draw trajectory.png: from noise to image")
    nearest: bool = opt(False, "also draw nearest.png: samples and their nearest training images")
    from_: str = opt("", "vary the images of this folder instead of starting from noise")
    strength: float = opt(0.6, "with --from: how far to noise them, 0 not at all, 1 to noise", 0, 1)
    interpolate: bool = opt(False, "also draw interpolate.png: the way between two noises")

@dataclass(frozen=True)
class EvaluateConfig(Sampling):
    """measure a checkpoint of either stage on held-out images"""
    data: str = opt("", "folder of held-out images; empty: the part held out in training")
    out: str = opt("", "folder for metrics.json and the picture; empty: beside the checkpoint")
    n: int = opt(500, "number of held-out images, and of samples", 2, 10**7)
    use_test: bool = opt(True, "also train classifiers on real and on made images, if classes")
    save_images: str = opt("", "also write real/ and recon/ or samples/ as PNGs into this folder")

@dataclass(frozen=True)
class DemoConfig(Machine):
    """the three above in a row"""
    data: str = opt("synthetic", "'synthetic' or a folder of images")
    out: str = opt("runs", "folder that gets vq/, ldm/ and samples/")
    preset: str = opt("default", "as in train-vq", choices=("default", "tiny", "report"))

@dataclass(frozen=True)
class BenchConfig(Machine):
    """speed and memory of each part on this machine"""
    preset: str = opt("default", "the settings to measure", choices=("default", "tiny", "report"))
    vq_flags: str = opt("", "more flags of train-vq: --vq-flags='--size 128 --batch-size 4'")
    ldm_flags: str = opt("", "more flags of train-ldm, likewise")
    minutes: float = opt(0.2, "time for each measurement", 0.001, 1e4)
    out: str = opt("runs/bench", "folder for bench.json and the runs that are timed")

COMMANDS = {"train-vq": VQConfig, "train-ldm": LDMConfig, "sample": SampleConfig,
            "demo": DemoConfig, "evaluate": EvaluateConfig, "bench": BenchConfig}

PRESETS = {         # "report": 256×256 as the papers do it, with eps, a linear schedule and the GAN
    "tiny": {
        VQConfig: dict(size=32, n_images=192, widths=(16, 32), codes=64, epochs=2,
                       gan_start=1.0, gan_ramp=0.5, d_widths=(16, 32), warmup=5, revive_every=5),
        LDMConfig: dict(unet_widths=(32, 64), batch_size=16, epochs=4, warmup=5, T=200)},
    "report": {
        VQConfig: dict(size=256, n_images=20_000, widths=(128, 128, 256, 256), z_dim=256,
                       codes=1024, commit_weight=1.0, perceptual_weight=1.0, gan_weight=1.0,
                       d_widths=(64, 128, 256), lr=1e-4, muon_lr=0.0, codes_lr=5e-4, d_lr=1e-4,
                       epochs=40, decay=0.0),
        LDMConfig: dict(target="eps", schedule="linear", weighting="alike",
                        unet_widths=(256, 512), class_cond=False, lr=1e-4, views=8, epochs=200,
                        ema=0.9999, decay=0.0)}}

def flag(name):
    return "--" + name.rstrip("_").replace("_", "-")

def check_values(cls, values):
    """Settings from the command line (as text) or a checkpoint -> checked and converted."""
    known, out = {fd.name: fd for fd in fields(cls)}, {}
    for name, value in values.items():
        m, kind = known[name].metadata, known[name].type
        one = int if kind == tuple[int, ...] else kind
        many = value if isinstance(value, (list, tuple)) else [value]
        shown = f"{flag(name)} {' '.join(map(str, many))}"
        if m["choices"] and value not in m["choices"]:
            raise UserError(f"{shown}: must be one of {', '.join(m['choices'])}")
        if one in (str, bool):
            if not isinstance(value, one) or one is str and "\0" in value:
                raise UserError(f"{shown!r}: must be {'a name' if one is str else 'true or false'}")
            out[name] = os.path.expanduser(value) if one is str else value      # --out=~/lesions
            continue
        try:
            numbers = tuple(one(v) for v in many)
            if not numbers or not all(m["lo"] <= v <= m["hi"] for v in numbers):    # nan fails too
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            noun = "a whole number" if one is int else "a number"
            raise UserError(f"{shown}: must be {noun} from {m['lo']:,} to {m['hi']:,}") from None
        out[name] = numbers if one is not kind else numbers[0]
    return out

class Parser(argparse.ArgumentParser):
    def error(self, message):       # one sentence, no usage dump
        raise UserError(message)

def build_parser():
    def wide(prog):
        return argparse.RawTextHelpFormatter(prog, max_help_position=30, width=118)
    top = Parser(prog="vqldm.py", allow_abbrev=False, formatter_class=wide,
                 description="VQGAN + latent diffusion in one file. Without flags, train-vq, "
                             "train-ldm and sample\nwork in a row on images that it draws itself.",
                 epilog="python vqldm.py COMMAND --help         what it can be told\n"
                        "python vqldm.py train-vq --data FOLDER  train on your own images\n"
                        "torchrun --nproc-per-node N vqldm.py train-vq   use N GPUs or cores")
    sub = top.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, cls in COMMANDS.items():          # what a class's docstring says is its line of help
        p = sub.add_parser(name, help=cls.__doc__, description=cls.__doc__, allow_abbrev=False,
                           formatter_class=wide, usage=f"vqldm.py {name} [settings]")
        for fd in fields(cls):
            kind, choices = fd.type, fd.metadata["choices"]
            many = kind == tuple[int, ...]
            default = " ".join(map(str, fd.default)) if many else str(fd.default)
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(
                nargs="+" if many else None,
                metavar="|".join(choices or ()) or {str: "TEXT", float: "X"}.get(kind, "N"))
            # trap: a default given to argparse would overwrite what a checkpoint recorded. SUPPRESS
            # keeps only what was typed.
            p.add_argument(flag(fd.name), dest=fd.name, default=argparse.SUPPRESS, **how,
                           help=fd.metadata["help"].replace("%", "%%")
                           + (f" [{default}]" if default else ""))
    return top

def parse_command(argv):
    """argv -> (command, its class of settings, the typed ones). Raises UserError."""
    args, unknown = build_parser().parse_known_args(argv)
    cls = COMMANDS[args.command]
    if unknown:
        word = unknown[0].split("=")[0]
        close = difflib.get_close_matches(word, [flag(fd.name) for fd in fields(cls)], 1)
        raise UserError(f"{word}: {args.command} has no such flag; " + (
            f"did you mean {close[0]}?" if close else f"{args.command} --help lists all"))
    typed = {k: v for k, v in vars(args).items() if k != "command"}
    return args.command, cls, check_values(cls, typed)

def settings(cls, typed, recorded=None):
    """Default < preset < recorded < typed. What differs from the record is an error."""
    if typed.get("resume") and typed.get("overwrite"):
        raise UserError("--resume goes on, --overwrite starts anew: give one of them")
    preset = PRESETS.get(typed.get("preset", "default"), {}).get(cls, {})
    old = {**recorded, "overwrite": False} if recorded else {}      # was for that session only
    cfg = cls(**{**preset, **old, **typed})
    differ = [f"{flag(fd.name)} was {old[fd.name]}, now {getattr(cfg, fd.name)}"
              for fd in fields(cls) if fd.name in old and not fd.metadata["free"]
              and old[fd.name] != getattr(cfg, fd.name)]
    if differ:
        raise UserError("--resume goes on with the recorded settings, but " + "; ".join(differ)
                        + ". Leave these flags out, or start anew with another --out")
    if old or not typed.get("resume"):         # else what it goes on with is not known yet
        cfg.check()
    return cfg

if __name__ == "__main__":      # --help and mistakes end here, before the seconds that torch takes
    try:
        settings(*parse_command(sys.argv[1:])[1:])
    except UserError as e:
        print(f"vqldm: {e}", file=sys.stderr)
        sys.exit(2)

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")   # trap: read only when torch is imported
import contextlib
import copy
import csv
import hashlib
import io
import json
import re
import shlex
import signal
import socket
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 2. Machine
# ------------------------------------------------------------------------------------------------
# On what do we compute, in which number format, how many of us are there, and where do random
# numbers come from? Every line of training depends on these, so they are answered once.

def pick_device(cfg):
    """-> (device, dtype for autocast or None for plain fp32). Says which, and why."""
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else \
        "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(                      # with torchrun each process has its own GPU
            f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except Exception:       # torch raises anything from AssertionError to RuntimeError here
        raise UserError(f"--device {name}: not on this machine; auto and cpu work") from None
    fast, why = False, f"not measured on {device.type}"
    if device.type == "cuda":
        if (n := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > torch.cuda.device_count():
            raise UserError(f"torchrun --nproc-per-node {n}: there are only "
                            f"{torch.cuda.device_count()} GPUs")
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        why = torch.cuda.get_device_name(device)
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(device)
    elif device.type == "cpu":      # without units for it bf16 is emulated: slower than fp32
        units = [unit for test, unit in (("_is_amx_tile_supported", "AMX"),
                                         ("_is_avx512_bf16_supported", "AVX512-BF16"))
                 if getattr(torch.cpu, test, lambda: False)()]
        fast, why = bool(units), f"this CPU has {units[0] if units else 'no bf16 units known'}"
    bf16 = fast if cfg.precision == "auto" else cfg.precision == "bf16"
    say(f"device {device}, {'bf16' if bf16 else 'fp32'} "
        f"({why if cfg.precision == 'auto' else 'as asked'}), {torch.get_num_threads()} threads"
        + f", process 1 of {world()}" * (world() > 1))
    return device, torch.bfloat16 if bf16 else None

def autocast(device, dtype):
    """Matrix products in dtype, what needs more in fp32; all in fp32 for None."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

def rng(*key):
    """The random numbers that belong to a key, such as (seed, "turns", step).

    Randomness is looked up, never carried along: step 700 draws the same numbers whether the run
    went there at once, was killed and resumed, or drew a preview on the way. There is no random
    state that a checkpoint could forget. Drawn on the CPU, it is the same for every device."""
    return torch.Generator().manual_seed(digest(repr(key).encode()) >> 1)

def digest(data):       # bytes -> a number of 64 bits, the same on every machine
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")

# Many processes (torchrun): each takes its share of the global batch; the mean of their gradients
# is the gradient of the whole. All look up the random numbers of the whole batch and cut out their
# share, so N processes do what one would do. DistributedDataParallel does the same, but sends
# gradients while others are still being computed.
def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def share(batch):       # this process's part of what has one entry per image of the global batch
    n = len(batch) // world()
    return batch[rank() * n:(rank() + 1) * n]

def sum_over_processes(t):
    if world() > 1:
        dist.all_reduce(t)
    return t

def gather(t):          # the parts of all processes, in their order, on all of them
    parts = t.new_zeros(world(), *t.shape)
    parts[rank()] = t
    return sum_over_processes(parts).flatten(0, 1)

def average_gradients(params):
    if world() > 1:
        grads = [p.grad for p in params if p.grad is not None]
        mean = sum_over_processes(torch.cat([g.flatten() for g in grads])) / world()
        for g, m in zip(grads, mean.split([g.numel() for g in grads])):
            g.copy_(m.view_as(g))

def first_then_others(make):        # process 0 makes a file, then the others read it
    if rank() > 0:
        dist.barrier()
    try:
        return make()
    finally:                        # even if it failed: the others wait, and fail alike
        if world() > 1 and rank() == 0:
            dist.barrier()

def say(text):
    if rank() == 0:
        tqdm.write(text)

# ------------------------------------------------------------------------------------------------
# 3. Synthetic lesions
# ------------------------------------------------------------------------------------------------
# To run tonight without a download, the program draws its own dermoscopy-like images, in four
# classes whose rules stand here, so that samples can be checked against them. Image i is a function
# of (seed, i): a tape of random numbers, then arithmetic on all pixels of some images at once.

SYNTHETIC_CLASSES = ("keratosis-like", "melanoma-like", "nevus-like", "vascular-like")
SKIN = ((.93, .74, .66), (.90, .62, .60), (.80, .68, .70), (.91, .76, .58), (.84, .60, .64))
LESION = (((.72, .60, .44), (.60, .48, .34), (.80, .72, .58), (.55, .47, .40)),  # tan, cream, grey
          ((.26, .15, .11), (.45, .29, .20), (.33, .36, .47), (.55, .27, .27)),  # black, blue, red
          ((.52, .31, .22), (.62, .40, .28), (.38, .22, .16), (.68, .42, .34)),  # browns
          ((.66, .12, .18), (.52, .08, .20), (.76, .24, .26), (.40, .12, .28)))  # reds, purple

def hair_distance(xy, a, b, c):
    """Distance of each pixel to quadratic Bezier curves, control points (R,n,2) -> (R,n,H,W)."""
    s = torch.linspace(0, 1, 13).view(1, 1, 13, 1)
    curve = (1 - s) ** 2 * a[:, :, None] + 2 * s * (1 - s) * b[:, :, None] + s ** 2 * c[:, :, None]
    nearest = torch.full((*a.shape[:2], *xy.shape[1:]), 9.0)
    for i in range(12):         # twelve straight pieces
        p, q = curve[:, :, i, :, None, None], curve[:, :, i + 1, :, None, None]
        along = ((xy - p) * (q - p)).sum(2, keepdim=True) / (q - p).square().sum(2, keepdim=True)
        nearest = torch.minimum(nearest, (xy - p - along.clamp(0, 1) * (q - p)).square().sum(2))
    return nearest.sqrt()

def synthetic(n, size, seed, start=0):
    """Draw images start … start+n-1 of the endless set `seed`.

    -> uint8 (n, 3, size, size), int64 labels (n,) that index SYNTHETIC_CLASSES."""
    tapes = [rng(seed, "lesion", i) for i in range(start, start + n)]

    def span(lo, hi, *shape):               # the next numbers of each tape, uniform in lo…hi
        u = torch.stack([torch.rand(shape or (1, 1, 1), generator=tape) for tape in tapes])
        return lo + (hi - lo) * u

    def noise(cells, channels=1):           # smooth, about -1…1; more cells give a finer grain
        return F.interpolate(span(-1, 1, channels, cells, cells), (size, size), mode="bicubic",
                             align_corners=True)

    def paint(image, colour, alpha):
        return image + (colour - image) * alpha

    def rgb(*c):
        return torch.tensor(c).view(3, 1, 1)

    label = torch.arange(start, start + n) % 4
    pale, melanoma, nevus, red = ((label == c).float().view(n, 1, 1, 1) for c in range(4))
    axis, pixel = (torch.arange(size) + 0.5) / size * 2 - 1, 2 / size
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))           # (2,H,W) in -1…1

    # Skin: a mixture of five tones, cloudy, with a fine grain.
    mix = span(0, 1, 5) ** 2
    image = (mix / mix.sum(1, keepdim=True) @ torch.tensor(SKIN)).view(n, 3, 1, 1) * span(.86, 1.06)
    image = image + .035 * noise(4, 3) + .025 * noise(9) + .018 * noise(24) * rgb(.5, 1, 1)

    # Border: an ellipse whose radius swings with the angle; melanomas swing and warp the most.
    centre = span(-.16, .16, 2, 1, 1)
    d = xy - centre + .09 * noise(5, 2) * (.35 + melanoma) + .03 * noise(12, 2) * (.5 + melanoma)
    turned, stretch = span(0, math.pi, 1, 1), span(1, 1.3, 1, 1)
    dx = d[:, 0] * turned.cos() + d[:, 1] * turned.sin()
    dy = d[:, 1] * turned.cos() - d[:, 0] * turned.sin()
    k = torch.arange(2, 9).view(7, 1, 1)
    phase = k * torch.atan2(dy, dx)[:, None] + span(0, 6.3, 7, 1, 1)
    swing = (span(-1, 1, 7, 1, 1) / k.sqrt() * phase.cos()).sum(1)
    radius = span(.30, .58, 1, 1) * (1 - .3 * red[:, 0])
    edge = 1 + (.05 + .20 * melanoma + .04 * pale)[:, 0] * swing
    inside = (edge - (dx * dx / stretch + dy * dy * stretch).sqrt() / radius)[:, None]
    lesion = torch.sigmoid(2.2 * inside / (span(.06, .24) * (nevus + .7 * melanoma)
                                           + .05 * (pale + red)))         # 1 inside, 0 outside

    # Colours: the class's four, each around a spot; apart in melanomas, blended in the others.
    spots = centre.view(n, 1, 2) + span(-.9, .9, 4, 2) * radius
    colours = torch.tensor(LESION)[label] + span(-.04, .04, 4, 3) + span(-.07, .07, 1, 3)
    away = (xy - spots[..., None, None]).square().sum(2).sqrt()           # (n,4,H,W)
    part = torch.softmax(1.3 * noise(6, 4) * (1 + melanoma) - away * (3 + 9 * melanoma), 1)
    body = torch.einsum("nphw,npc->nchw", part, colours) + .05 * noise(16)
    body = body * (1 - span(-.1, .5) * inside.clamp(0, 1) * (nevus + .3 * melanoma))

    # Network: walls between random cells; brown in nevi, pale between the blood lakes of red ones.
    warp, cells = .12 * noise(10, 2), span(-.8, .8, 40, 2)
    near = (warp[:, None] + xy - cells[..., None, None]).square().sum(2)  # (n,40,H,W)
    near = near.topk(2, 1, largest=False).values.sqrt()
    wall = torch.exp(-((near[:, 1:] - near[:, :1]) / (1.2 * pixel + .03)).square())
    wall = wall * torch.sigmoid(noise(5) * 5 + .5)
    body = body * (1 - wall * (span(.1, .45) * nevus + span(.1, .3) * melanoma))
    body = body * (1 - red * (.30 - .9 * near[:, :1]).clamp(0, .4))
    septa = (colours.mean(1) * .6 + torch.tensor((.40, .30, .32))).view(n, 3, 1, 1)
    image = paint(image, paint(body, septa, .45 * wall * red), lesion * span(.8, 1))

    # Globules: dark dots, and in keratoses pale cysts too.
    dots = centre.view(n, 1, 2) + span(-1, 1, 14, 2) * radius
    there = span(0, 1, 14, 1, 1) < .25 * nevus + .45 * melanoma + .55 * pale
    away = (warp[:, None] * .5 + xy - dots[..., None, None]).square().sum(2).sqrt()
    dot = torch.sigmoid((span(.012, .07, 14, 1, 1) - away) / (.7 * pixel)) * there * lesion
    image = paint(image, image * .42, .85 * dot[:, :9].amax(1, keepdim=True))
    image = paint(image, rgb(.93, .89, .80), .9 * dot[:, 9:].amax(1, keepdim=True) * pale)

    # Hairs on three of ten images: up to eight curves from outside the picture.
    count, angle = (span(0, 1) < .3) * span(1, 9), span(0, 2 * math.pi, 8, 1)
    other = angle + span(.55, 1.45, 8, 1) * math.pi
    a = 1.25 * torch.cat([angle.cos(), angle.sin()], 2)
    c = 1.25 * torch.cat([other.cos(), other.sin()], 2) * span(-.1, 1, 8, 1)
    b, thick, dark = (a + c) / 2 + span(-.35, .35, 8, 2), span(.006, .014), span(.55, .85)
    hairy = (count.flatten() > 0).nonzero().flatten()
    away = hair_distance(xy, a[hairy], b[hairy], c[hairy])
    hair = torch.sigmoid((thick[hairy] - away) / (.45 * pixel))
    hair = (hair * (torch.arange(8).view(8, 1, 1) < count[hairy])).amax(1, keepdim=True)
    image[hairy] = paint(image[hairy], rgb(.20, .13, .10), dark[hairy] * hair)

    # Light from one side, darker corners, and on some the dark round edge of the dermatoscope.
    side = span(0, 2 * math.pi)
    image = image * (1 + span(0, .12) * (xy[0] * side.cos() + xy[1] * side.sin()))
    off = (xy - span(-.06, .06, 2, 1, 1)).square().sum(1, keepdim=True).sqrt()
    rim = .04 + .96 * torch.sigmoid((span(.93, 1.08) - off) / (1.2 * pixel))
    image = image * (1 - .13 * off * off) * torch.where(span(0, 1) < .18, rim, 1.0)
    return (image.clamp(0, 1) * 255).round().byte(), label

# ------------------------------------------------------------------------------------------------
# 4. A folder of images
# ------------------------------------------------------------------------------------------------
# Hours are lost to one bad image in a folder, and most of a laptop's time to decoding JPEGs. So
# each image is opened once, before training: turned upright, made RGB, cut to its centred square,
# resized and written as uint8 into one .npy file; a bad one is named and skipped. Training reads
# rows of that file: no worker processes, no waiting, the same order on every machine.

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLITS = dict(train=0, training=0, val=1, valid=1, validation=1, test=1, testing=1)    # 1: held out
NO_PHOTO = ("_segmentation", "_superpixels", "_mask", "_expert")        # masks beside ISIC's photos
SHEETS = ("grid.png", "trajectory.png", "nearest.png", "guidance.png", "interpolate.png")    # ours

def to_float(x):        # uint8 0…255 -> [-1,1], the only range that images have in this program
    return x.float() / 127.5 - 1

def to_bytes(x):        # and back
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()

def turn(x, turns):
    """Each image (B,C,H,H) in one of the square's eight symmetries (B,): dermoscopy has no up."""
    x = torch.where((turns >= 4).view(-1, 1, 1, 1), x.flip(3), x)
    return torch.stack([y.rot90(int(s) % 4, (1, 2)) for y, s in zip(x, turns)])

def decode(path, size, enlarged):
    """A file -> uint8 (3, size, size), or an exception that says what is wrong with it. The path of
    one that is smaller than that is put into the list `enlarged`."""
    # trap: whatever its suffix, PIL would open 40 kinds of files, and run Ghostscript for one.
    with Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")) as im:
        if im.width * im.height > Image.MAX_IMAGE_PIXELS:       # a small file can claim gigabytes
            raise ValueError(f"{im.width}×{im.height} pixels: exceeds limit")
        if min(im.size) < size:
            enlarged.append(path)
        im.draft("RGB", (size, size))       # JPEG at 1/2, 1/4, 1/8 of its size: 4 times faster
        im = ImageOps.exif_transpose(im)    # cameras store "turn me" beside the pixels
        if im.mode[0] in "IF":
            a = np.asarray(im, np.float64)              # 16 bits: PIL would clip at 255, to white
            top = 65535 if im.mode[0] == "I" and a.max() > 255 else max(a.max(), 1)
            im = Image.fromarray((a / top * 255).clip(0, 255).astype(np.uint8))
        if "A" in im.getbands() or "transparency" in im.info:   # hidden pixels are often junk
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return np.asarray(ImageOps.fit(im.convert("RGB"), (size, size))).transpose(2, 0, 1)

def list_images(folder):
    """-> (the image files under a folder, sorted, relative to it; the number of others)."""
    found, total, seen = [], 0, set()

    def closed(e):                      # os.walk alone would pass over it in silence
        raise UserError(f"--data {e.filename}: cannot be opened ({e.strerror})")
    for base, dirs, names in os.walk(folder, followlinks=True, onerror=closed):
        here = os.stat(base)
        if (here.st_dev, here.st_ino) in seen:      # a link back up would go round for ever
            dirs.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        dirs[:] = [d for d in dirs if not d.startswith(".")]
        for p in (Path(base, name) for name in names):
            ok = p.suffix.lower() in SUFFIXES and p.name[0] != "." and "-partial" not in p.name \
                and not p.is_fifo()
            if ok and not p.stem.lower().endswith(NO_PHOTO) and p.name not in SHEETS:
                found.append(p.relative_to(folder).as_posix())
        total += len(names)
    return sorted(found), total - len(found)

def read_table(folder):
    """A metadata.csv or manifest.csv in the folder or beside it -> {image id: its row}."""
    for path in (*sorted(folder.glob("*metadata*.csv")), folder / "manifest.csv",
                 folder.parent / "metadata.csv", folder.parent / "manifest.csv"):
        if path.is_file():
            with open(path, newline="", encoding="utf-8-sig", errors="replace") as f, \
                    contextlib.suppress(csv.Error):         # no table: as if it were not there
                if table := {row[key]: row for row in csv.DictReader(f)
                             for key in ("isic_id", "image_id", "image") if key in row}:
                    return table
    return {}

def place(key):         # a name -> a number in 0…1, the same on every machine
    return digest(key.encode("utf8", "surrogateescape")) / 2**64

def arrange(folder, names, held_out):
    """-> (class of each image, is it held out). Folders say it, else a table, else a hash.

    trap: several photographs show one lesion. Split by photograph, a network is measured on lesions
    that it trained on. Where lesion_id is known a whole lesion goes to one side, and a photograph
    of an unknown lesion to training, since it might show any of them."""
    table, classes, sides, lesions = read_table(folder), [], [], []
    flat = len({Path(name).parent for name in names}) == 1
    known = any(row.get("lesion_id") for row in table.values())
    for name in names:
        *parents, _ = Path(name).parts
        row = table.get(Path(name).stem, {})
        told = next(filter(None, map(row.get, ("diagnosis_3", "diagnosis_1", "dx", "class"))), "")
        parent = parents[-1] if parents and parents[-1].lower() not in SPLITS else ""
        classes.append(((told or parent) if flat else (parent or told)) or "images")
        sides.append(max((SPLITS[p.lower()] for p in parents if p.lower() in SPLITS), default=0))
        lesions.append(row.get("lesion_id") or ("" if known else Path(name).stem))
    if any(sides):
        return classes, [bool(s) for s in sides]
    held = [bool(lesion) and place(lesion) < held_out for lesion in lesions]
    if not any(held) or all(held):              # a handful of images: hold out one lesion
        one = min((lesion for lesion in lesions if lesion), key=place, default=None)
        held = [lesion == one for lesion in lesions]
    return classes, held

class Images:
    """Decoded images on disk. train, held: row numbers. labels: index into classes, by row."""

    def __init__(self, path):
        info = json.loads(path.with_suffix(".json").read_text())
        self.path, self.names, self.classes = path, info["names"], info["classes"]
        self.size, self.key, self.bad = info["size"], info["key"], info["bad"]
        self.labels = torch.tensor(info["labels"])              # -1: unreadable
        good, held = self.labels >= 0, torch.tensor(info["held"])
        self.all, self.train, self.held = (
            m.nonzero().flatten() for m in (good, good & ~held, good & held))
        if not len(self.train) or not len(self.held):           # one image: measure on it too
            self.train = self.held = self.all
        self.kinds = self.labels[self.train]                    # classes of the training images
        # In a folder the first images are of one class: measure on a mixture.
        self.held = self.held[torch.randperm(len(self.held), generator=rng("held"))]

    def rows(self, indices):
        """uint8 (B,3,H,W). Mapped anew each time: pages of an old map would count as our memory."""
        return torch.from_numpy(np.load(self.path, mmap_mode="r")[np.asarray(indices)])

    def batch(self, indices, turns=None):
        """(B,3,H,W) in [-1,1]."""
        x = self.rows(indices)
        return to_float(x if turns is None else turn(x, turns))

def write_npy(path, dtype, shape, size, rows, name):
    """A .npy file of rows(their numbers), `size` rows at a time; no more than these are held."""
    def write(f):
        head = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(f, head)
        for numbers in batches(shape[0], size, name):
            f.write(np.ascontiguousarray(rows(numbers), dtype).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)

def load_images(source, size, n_images, held_out, cfg, flag_name="--data"):
    """'synthetic' or a folder -> Images; drawn or decoded once, then read from the cache."""
    if source == "synthetic":
        names = [f"{i:06d}" for i in range(n_images)]
        classes = [SYNTHETIC_CLASSES[i % 4] for i in range(n_images)]
        held = [int((i // 4 + 1) * held_out) > int(i // 4 * held_out) for i in range(n_images)]
        label, step, key = source, 16, (1, n_images, cfg.seed)
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise UserError(f"{flag_name} {source}: no such folder; a folder of images or "
                            "'synthetic'")
        names, other = list_images(folder)
        if not names:
            raise UserError(f"{flag_name} {source}: no image in it, {other} other files; images "
                            "end in " + " ".join(SUFFIXES))
        if other:
            say(f"passed over {other} files that are no photographs: masks, tables, half downloads")
        classes, held = arrange(folder, names, held_out)
        stats = [os.lstat(folder / name) for name in names]
        label, step = folder.resolve().name, 256
        key = (str(folder.resolve()), names, [(s.st_size, s.st_mtime_ns) for s in stats])
    key = f"{int(place(repr((key, classes, held, size))) * 2**52):013x}"
    path = Path(cfg.cache) / f"{label}-{size}-{key}.npy"
    if not (path.exists() and path.with_suffix(".json").exists()):
        bad, enlarged = {}, []

        def one(i):
            try:
                return decode(folder / names[i], size, enlarged)
            except Exception as e:      # PIL raises nearly anything on a broken file
                bad[i] = f"{names[i]!r} ({' '.join(str(e).split())[:60] or type(e).__name__})"
                return np.zeros((3, size, size), np.uint8)

        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.simplefilter("ignore")         # PIL's own, about images that it can read
            write_npy(path, np.uint8, (len(names), 3, size, size), step, lambda i: (
                synthetic(len(i), size, cfg.seed, int(i[0]))[0] if source == "synthetic"
                else np.stack(list(pool.map(one, i.tolist())))), "preparing images")
        if enlarged:
            say(f"WARNING {len(enlarged)} images are smaller than {size}×{size} and were enlarged: "
                "the networks will learn their blur")
        kinds = sorted({c for i, c in enumerate(classes) if i not in bad})
        info = dict(key=key, size=size, names=names, classes=kinds, held=held,
                    labels=[-1 if i in bad else kinds.index(c) for i, c in enumerate(classes)],
                    bad=[bad[i] for i in sorted(bad)])
        write_whole(path.with_suffix(".json"), lambda f: f.write(json.dumps(info).encode()))
    images = Images(path)
    if images.bad:
        n, rest = len(images.bad), len(images.bad) - 5
        text = f"{n} of {len(names)} images cannot be read: " + "; ".join(images.bad[:5]) \
            + f" and {rest} more" * (rest > 0)
        if n == len(names) or n > 0.2 * len(names) and not cfg.allow_bad:
            raise UserError(f"{flag_name} {source}: {text}. Mend them, or go on with --allow-bad")
        say(f"skipped: {text}")
    return images

def get_images(cfg, source, vq_cfg, state=None, whole="", flag_name="--data"):
    """load_images on all processes; say what was found, and if a resumed run (state) had others.
    whole: what all of them are for, if not to train on a part and hold out the other."""
    cfg = replace(cfg, seed=vq_cfg.seed)        # of the images, not of this command
    images = first_then_others(lambda: load_images(
        source, vq_cfg.size, vq_cfg.n_images, vq_cfg.held_out, cfg, flag_name))
    n = torch.bincount(images.labels[images.labels >= 0]).tolist()
    say(f"data {source} at {images.size}×{images.size}: " + (
        f"{len(images.all)} images {whole}" if whole else
        f"{len(images.train)} images to train on, {len(images.held)} held out") + "; classes: "
        + ", ".join(f"{c} {k}" for c, k in zip(images.classes, n)))
    if state and state["data"] != images.key:
        say("WARNING the image files were changed or moved since this run began: not bit-equal now")
    if len(images.train) < 100 and not whole:
        say(f"WARNING {len(images.train)} images are few: the networks will learn them by heart")
    return images

# ------------------------------------------------------------------------------------------------
# 5. Blocks
# ------------------------------------------------------------------------------------------------
# VQGAN and UNet are built from the same five bricks. Two things differ, each an argument here: in
# the UNet's ResBlocks an embedding of the time scales and shifts what the second norm puts out
# (emb), and its UpBlocks concatenate, after upsampling, what the DownBlock of the same size put out
# (skip). The optimiser that moves the bricks stands here too.

class Norm(nn.GroupNorm):
    """GroupNorm for any width: up to 32 groups, a power of two, at least four channels in each. It
    treats each image alone, so batch size and number of processes change nothing."""
    def __init__(self, c):
        super().__init__(math.gcd(32, c // 4 or 1, c), c)

    def forward(self, x):
        # In channels_last PyTorch's bf16 CPU kernel is 6 to 9 times slower backwards than in the
        # plain layout. There and back makes a step 1.2 (VQGAN) to 1.5 times (UNet) faster.
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)

def zero(layer):
    """trap: a residual branch that starts as noise gives a first loss above 1 and a slow start.
    From zero weights on the last layer every block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer

class ResBlock(nn.Module):
    """GroupNorm, SiLU, Conv, GroupNorm (scaled and shifted), SiLU, Conv, plus the shortcut. Scale
    and shift say how noisy z_t is (Dhariwal & Nichol 2021, 2105.05233, AdaGN); an embedding that is
    only added, as in DDPM, gave a Fréchet distance of 641 instead of 613."""
    def __init__(self, c_in, c_out, emb_dim=None):
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = zero(nn.Linear(emb_dim, 2 * c_out)) if emb_dim else None
        self.norm2, self.conv2 = Norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):                                       # (B,c_in,H,W), (B,E)
        y = self.norm2(self.conv1(F.silu(self.norm1(x))))                 # (B,c_out,H,W)
        if self.emb is not None:
            scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)
            y = y * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(y))

class AttentionBlock(nn.Module):
    """Every position looks at every other: the paper's non-local block (VQGAN Table 7). Its cost
    grows with (h·w)²: fine on 16×16; on 64×64 44 % of a step (widths 16 64), on 128×128 88 %. So
    it sits in the middle only."""
    def __init__(self, c, heads):
        super().__init__()
        self.norm, self.attention = Norm(c), nn.MultiheadAttention(c, heads, batch_first=True)
        zero(self.attention.out_proj)

    def forward(self, x):                                                 # (B,C,h,w)
        y = rearrange(self.norm(x), "B C h w -> B (h w) C")               # (B,N,C)
        # trap: need_weights=True, the default, would keep B·heads·N² numbers
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + rearrange(y, "B (h w) C -> B C h w", h=x.shape[2])

class DownBlock(nn.Module):
    """Two ResBlocks, then a strided convolution. -> (the halved map, the full one as a skip)."""
    def __init__(self, c_in, c_out, emb_dim=None):
        super().__init__()
        self.res1, self.res2 = ResBlock(c_in, c_out, emb_dim), ResBlock(c_out, c_out, emb_dim)
        self.down = nn.Conv2d(c_out, c_out, 4, stride=2, padding=1)

    def forward(self, x, emb=None):                                       # (B,c_in,H,W)
        skip = self.res2(self.res1(x, emb), emb)                          # (B,c_out,H,W)
        return self.down(skip), skip                                      # (B,c_out,H/2,W/2)

class MidBlock(nn.Module):
    """ResBlock, self-attention, ResBlock, on the smallest grid."""
    def __init__(self, c, heads, emb_dim=None):
        super().__init__()
        self.res1, self.res2 = ResBlock(c, c, emb_dim), ResBlock(c, c, emb_dim)
        self.attention = AttentionBlock(c, heads)

    def forward(self, x, emb=None):                                       # (B,C,h,w) -> same
        return self.res2(self.attention(self.res1(x, emb)), emb)

class UpBlock(nn.Module):
    """A transposed convolution of stride 2, the skip beside it (UNet), then two ResBlocks."""
    def __init__(self, c_in, c_out, emb_dim=None, c_skip=0):
        super().__init__()
        # trap: a kernel that is no multiple of the stride, such as 3 and 2, paints some pixels more
        # often than others: a checkerboard. With 4 and 2 each pixel is painted 2×2 times.
        self.up = nn.ConvTranspose2d(c_in, c_in, 4, stride=2, padding=1)
        self.res1 = ResBlock(c_in + c_skip, c_out, emb_dim)
        self.res2 = ResBlock(c_out, c_out, emb_dim)

    def forward(self, x, emb=None, skip=None):                            # (B,c_in,h,w)
        x = self.up(x)                                                    # (B,c_in,2h,2w)
        x = x if skip is None else torch.cat([x, skip], 1)                # (B,c_in+c_skip,2h,2w)
        return self.res2(self.res1(x, emb), emb)                          # (B,c_out,2h,2w)

def orthogonal(g):
    """g (r,n) = U S Vᵀ -> about U Vᵀ: its singular values become .7 to 1.2, all directions alike.

    Newton-Schulz: the polynomial s -> 3.4445 s - 4.775 s³ + 2.0315 s⁵, five times in a row, drives
    each s in 0…1 there (Jordan 2024, kellerjordan.github.io/posts/muon). Done on g gᵀ
    (or gᵀ g, if smaller), it takes only small products: no SVD, and fp32 is exact enough."""
    x = (g if len(g) <= g.shape[1] else g.T) / (g.norm() + 1e-7)          # (r,n), r <= n
    gram = x @ x.T                                                        # (r,r): S² of x
    product = eye = torch.eye(len(x), device=g.device)
    for _ in range(5):
        p = 3.4445 * eye - 4.775 * gram + 2.0315 * gram @ gram            # x -> p x
        product, gram = p @ product, p @ gram @ p
    return product @ x if len(g) <= g.shape[1] else (product @ x).T

class Muon(torch.optim.Adam):
    """Adam; but in groups with muon=True each kernel is taken as a matrix (first axis, the others)
    and moves by lr in all its directions: along orthogonal(running mean of the gradient).

    Why: a gradient is strong along a few directions, the large singular values. Adam, number by
    number, follows these and learns the others slowly. After one epoch of stage 1, 461 steps,
    32.1 dB and LPIPS .028 instead of 29.9 and .049, for 7 % of the time (stage 2: 16 %)."""
    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        for group in groups:
            for p in group["params"] if group["muon"] else ():
                state = self.state[p]
                if not state:           # Adam's loading wants a step in each state
                    state.update(step=torch.zeros(()), mean=torch.zeros_like(p))
                state["mean"].lerp_(p.grad, 0.05)
                g = p.grad.lerp(state["mean"], 0.95).flatten(1)           # Nesterov: look ahead
                tall = max(1, len(g) / g.shape[1]) ** 0.5   # fewer directions: longer steps in each
                p.sub_(group["lr"] * tall * orthogonal(g).view(p.shape))
        self.param_groups = [g for g in groups if not g["muon"]]          # Adam sees its own only
        super().step()
        self.param_groups = groups

def make_optimizer(net, lr, betas, muon_lr=0.0, own=()):
    """Inner kernels by Muon if muon_lr > 0, all else by Adam: first and last layers speak of pixels
    and latents, where each channel is a thing of its own. own: {parameter: its learning rate}.
    (fused: one pass over all.)"""
    kernels = [m.weight for name, m in net.named_modules()
               if muon_lr and isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))
               and name.split(".")[-1] not in ("first", "last")]
    rest = [p for p in net.parameters() if p not in {*kernels, *own}]
    groups = [(rest, lr, False), *(([p], own_lr, False) for p, own_lr in dict(own).items()),
              (kernels, muon_lr, True)]
    return Muon([dict(params=ps, initial_lr=rate, muon=muon) for ps, rate, muon in groups if ps],
                lr, betas, fused=True)

# ------------------------------------------------------------------------------------------------
# 6. Stage 1: the VQGAN
# ------------------------------------------------------------------------------------------------
# The encoder makes the grid small, the codebook makes it discrete, the decoder undoes both. The
# codebook is the delicate part: an argmin has no gradient, and codes that never win never learn.
# Watch codes used (%) and perplexity: K if all are used equally, 1 if all have collapsed into one.

class Encoder(nn.Module):
    """x -> z: Conv, m DownBlocks, MidBlock, GroupNorm, SiLU, Conv (VQGAN Table 7)."""
    def __init__(self, widths, z_dim, heads):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in zip((widths[0], *widths), widths))
        self.mid = MidBlock(widths[-1], heads)
        self.norm, self.last = Norm(widths[-1]), nn.Conv2d(widths[-1], z_dim, 3, padding=1)

    def forward(self, x):                                                 # (B,3,H,W)
        y = self.first(x)
        for block in self.down:
            y, _ = block(y)                                               # the grid halves m times
        return self.last(F.silu(self.norm(self.mid(y))))                  # (B,d,h,w)

class Decoder(nn.Module):
    """z_q -> x_hat: the encoder's mirror image."""
    def __init__(self, widths, z_dim, heads):
        super().__init__()
        self.first = nn.Conv2d(z_dim, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1], heads)
        self.up = nn.ModuleList(
            UpBlock(a, b) for a, b in zip(widths[::-1], (*widths[-2::-1], widths[0])))
        self.norm, self.last = Norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q):                                               # (B,d,h,w)
        y = self.mid(self.first(z_q))
        for block in self.up:
            y = block(y)                                                  # the grid doubles m times
        y = F.silu(self.norm(y))
        with torch.autocast(y.device.type, enabled=False):      # lam (6) is measured here: in fp32
            return self.last(y.float())                                   # (B,3,H,W)

class Codebook(nn.Module):
    """Replaces each vector of z by the nearest of K learned ones."""
    def __init__(self, codes, z_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, z_dim)                       # (K,d)
        self.register_buffer("usage", torch.zeros(codes))                 # (K,) since last revival

    def nearest(self, z):
        """z (B,d,h,w) -> k (B,h,w)."""
        B, _, h, w = z.shape
        # trap: distances in bf16 choose 5-15 % of the codes wrongly, so this is fp32. Only the
        # winner's number is used, so they need no gradient. And flat: batched, cdist would repeat
        # the codebook B times in memory. (min: twice as fast as argmin on a CPU.)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z.float(), "B d h w -> (B h w) d")
            return torch.cdist(flat, self.embedding.weight).min(1).indices.view(B, h, w)       # (1)

    def lookup(self, k):
        """k (B,h,w) -> z_q (B,d,h,w)."""
        return rearrange(self.embedding(k), "B h w d -> B d h w")                              # (1)

    def forward(self, z):
        """z (B,d,h,w) -> z_q with the gradient of z, k (B,h,w), codebook loss, commitment loss."""
        k = self.nearest(z)                                               # (B,h,w)
        z_q = self.lookup(k)                                              # (B,d,h,w)
        # One distance, two halves; sg[] (detach) decides who moves: codes to the vectors that they
        # won, and the encoder to its codes.
        # trap: swapped weights, 0.25 on (3) and 1 on (4): z is pulled 4 times too hard to its
        # codes, and the curve looks better.
        codebook_loss = F.mse_loss(z_q, z.detach())                                            # (3)
        commit_loss = F.mse_loss(z, z_q.detach())                                              # (4)
        # Straight through: the value of z_q with the gradient of z. Rounding has no slope, so what
        # the decoder wants of z_q is passed on to z unchanged: a lie, but one that points downhill
        # while z and z_q are close, which is what (3) and (4) see to.
        # trap: take both losses from z_q, not from what is returned: that depends on no code.
        return z + (z_q - z).detach(), k, codebook_loss, commit_loss                           # (2)

    def count(self, k):
        """Note which codes won, on all processes."""
        won = torch.bincount(k.flatten(), minlength=len(self.usage)).float()
        self.usage += sum_over_processes(won)

    @torch.no_grad()
    def revive(self, z, dead, generator):
        """Move dead codes (a mask (K,)) onto encoder outputs z.

        trap: the usual start U(-1/K, 1/K) sits at the origin. Where the encoder's outputs do not, a
        few codes win everything and the others never get a gradient: the collapse. Here all codes
        start as encoder outputs, and one that has not won since the last revival starts again."""
        flat = gather(rearrange(z.detach().float(), "B d h w -> (B h w) d"))
        flat, n = flat[flat.isfinite().all(1)], int(dead.sum())
        if not len(flat):               # a NaN batch: the codes stay as they are
            return
        pick = torch.randint(len(flat), (n,), generator=generator).to(flat.device)
        apart = 0.01 * flat.std(0) * torch.randn(n, flat.shape[1], generator=generator).to(flat)
        self.embedding.weight[dead.to(flat.device)] = flat[pick] + apart
        self.usage.zero_()

    @torch.no_grad()
    def settle(self, z):
        """Draw each vector of z towards its code until it is at most one code spacing away. The
        region that belongs to a code is convex, so the code stays the same. (B,d,h,w) -> same."""
        e = self.embedding.weight[:4096]        # K² distances: enough of them for a median
        spacing = torch.cdist(e, e).fill_diagonal_(math.inf).amin(1).median()
        z_q = self.lookup(self.nearest(z))
        away = (z - z_q).norm(dim=1, keepdim=True).clamp(min=1e-12)       # (B,1,h,w)
        return z_q + (z - z_q) * (spacing / away).clamp(max=1)

class VQGAN(nn.Module):
    """Encoder, codebook and decoder, for images in [-1,1] whose sides are multiples of f."""
    def __init__(self, widths, z_dim, codes, heads):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, z_dim, heads), Decoder(widths, z_dim, heads)
        self.codebook, self.f = Codebook(codes, z_dim), 2 ** len(widths)

    def encode(self, x):
        """x (B,3,H,W) -> z (B,d,h,w) before quantisation; settled, it is what stage 2 diffuses."""
        return self.encoder(x).float()

    def decode(self, z):
        """z (B,d,h,w) -> nearest codes -> x_hat (B,3,H,W).
        trap: the decoder has only ever seen codes, so what stage 2 makes is quantised here."""
        return self.decoder(self.codebook.lookup(self.codebook.nearest(z)))

    def forward(self, x):
        """-> x_hat, z, k, codebook loss, commitment loss."""
        z = self.encode(x)
        z_q, k, codebook_loss, commit_loss = self.codebook(z)
        return self.decoder(z_q), z, k, codebook_loss, commit_loss

# ------------------------------------------------------------------------------------------------
# 7. Stage 1: the losses
# ------------------------------------------------------------------------------------------------
# Pixel distance alone gives blur: the mean of all sharp images that fit. LPIPS compares what a
# trained network sees; the discriminator learns what still gives a reconstruction away. They pull
# with very different strength, and lam (6) keeps the last from winning.

class PatchDiscriminator(nn.Module):
    """pix2pix's critic: a real-or-fake logit for each patch, (B,3,H,W) -> (B,1,h',w').

    trap: no sigmoid at the end; hinge needs raw logits. GroupNorm where pix2pix has BatchNorm: real
    and fake can share one pass, and processes need not share statistics."""
    def __init__(self, widths):
        super().__init__()
        layers = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), Norm(b), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x):
        return self.layers(x).float()

def hinge_loss(real, fake):
    """D's loss from its logits: real ones above 1 and fake ones below -1 cost nothing more."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2                             # (7)

def adaptive_weight(l_rec, l_gan, x_hat, last, delta=1e-4, cap=1e4):
    """lam (6), and the gradients of both losses with respect to x_hat, for the backward pass.

    Why adaptive: D's gradient can be a thousand times stronger or weaker than the reconstruction's,
    and changes as D learns. Scaled so that both push the decoder's last layer equally hard, neither
    can drown the other. By the chain rule ∇_L loss = (∂x_hat/∂L)ᵀ ∂loss/∂x_hat: each loss is walked
    back once, to x_hat, and from there it is one convolution to L; no second full backward.
    trap: lam is a number, not a part of the graph; fp32; capped, since an untrained D has almost no
    gradient. -> lam (), ∂l_rec/∂x_hat, ∂l_gan/∂x_hat"""
    d_rec, d_gan = (torch.autograd.grad(loss, x_hat)[0] for loss in (l_rec, l_gan))
    at_last = [torch.autograd.grad(x_hat, last, d, retain_graph=True)[0] for d in (d_rec, d_gan)]
    rec, gan = ((sum_over_processes(g) / world()).norm() for g in at_last)
    lam = rec / (gan + delta)                                                                  # (6)
    return lam.clamp(max=cap), d_rec, d_gan

class Perceptual:
    """LPIPS (Zhang et al. 2018) and, from the same network, features for the Fréchet distance.

    trap: not an nn.Module, nor inside one: .train() would switch its dropout on, and checkpoints
    would carry its weights. Frozen, in eval mode, fp32, for images in [-1,1]."""
    def __init__(self, name, device):
        socket.setdefaulttimeout(20)                # without a network: give up soon
        with warnings.catch_warnings():             # torch and torchvision have advice for lpips
            warnings.simplefilter("ignore")
            import lpips
            self.net = lpips.LPIPS(net=name, verbose=False).to(device).eval().requires_grad_(False)
        self.name, self.device = name, device
        x = torch.rand(1, 3, 64, 64, generator=rng("lpips")).to(device) * 2 - 1
        if abs(float(self(x, x))) > 1e-4 or not float(self(x, -x)) > 0.01:
            raise UserError(f"--lpips {name}: its weights are damaged; delete them from "
                            f"{torch.hub.get_dir()}/checkpoints")

    def __call__(self, x, x_hat):
        """Mean distance of (B,3,H,W) to (B,3,H,W), in fp32. Has a gradient for x_hat only."""
        with torch.autocast(x.device.type, enabled=False):
            x, x_hat = x.float(), x_hat.float()
            if x.shape[-1] < 32:                    # nothing would be left after its strides
                x, x_hat = F.interpolate(x, (32, 32)), F.interpolate(x_hat, (32, 32))
            return self.net(x, x_hat).mean()

    def features(self, images, size=224, every=False):
        """uint8 (n,3,H,W) -> (n,C): the trunk's last map at size×size, or every one, averaged over
        space. The last alone is what Fréchet distances usually compare; a classifier wants all."""
        out = []
        for u8 in images.split(32):
            x = u8.to(self.device) / 255
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            maps = self.net.net(self.net.scaling_layer(x * 2 - 1))
            out.append(torch.cat([m.mean((2, 3)) for m in maps[0 if every else -1:]], 1).cpu())
        return torch.cat(out).double()

def load_perceptual(wanted, device):
    """-> (Perceptual or None, its name or 'off'). 'auto' goes on without, but says so loudly."""
    if wanted == "off":
        return None, "off"
    name = "squeeze" if wanted == "auto" else wanted
    try:
        return first_then_others(lambda: Perceptual(name, device)), name
    except UserError:
        raise
    except Exception as e:          # URLError, OSError, a damaged file: all mean "not to be had"
        size = {"squeeze": "5 MB", "alex": "233 MB", "vgg": "528 MB"}[name]
        text = (f"LPIPS's {name} weights ({size}) are not in {torch.hub.get_dir()}/checkpoints and "
                f"cannot be downloaded ({type(e).__name__}); put them there or set TORCH_HOME")
        if wanted != "auto":
            raise UserError(f"--lpips {name}: {text}, or take --lpips off") from None
        say(f"WARNING {text}. Going on WITHOUT LPIPS: training gives more blur, evaluate no "
            "Fréchet distance")
        return None, "off"

# ------------------------------------------------------------------------------------------------
# 8. Keeping a run
# ------------------------------------------------------------------------------------------------
# A night of training is lost in three ways: a checkpoint half written when the power went, a resume
# that restores the weights but not the rest, settings that silently differ. Here a checkpoint
# appears whole or not at all; what a step depends on is in it, or is a function of seed and step
# (rng above; only --minutes makes the learning rate follow the clock); and differing settings are
# refused. Nothing here is about the method.

FORMAT = 5              # of checkpoints; counts up when their meaning or a default changes
LOOP = dict(step=int, log=list, best=float, bad=int, data=str)      # checked on loading
PARTS = {"vq": LOOP | dict(model=dict, disc=dict, opt=dict, opt_d=dict, lpips=str),
         "ldm": LOOP | dict(model=dict, ema=dict, guide=dict, opt=dict, scale=torch.Tensor, vq=dict,
                            classes=list, class_counts=list, conditional=bool, guide_grows=bool)}
LOG_EVERY = 10          # steps between two rows of log.csv
WRITTEN = ["last.pt", "best.pt", "pre_gan.pt", "log.csv", "curves.png", "data_preview.png",
           "codebook.png", "recon_epoch_*.png", "samples_epoch_*.png"]
SAVE_EVERY = 300        # seconds between two checkpoints inside a long epoch
FIRST_LOOK = 100        # step of the first measurement and picture, before the first epoch ends

def write_whole(path, write):
    """A file appears complete or not at all: written aside, flushed to the disk, renamed.
    trap: torch.save straight onto the old file leaves neither old nor new when killed half way."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")     # two runs may make the same cache
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    if os.name == "posix":              # the new name is an entry of the folder: flushed by itself
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

def load_checkpoint(where, kinds, flag_name):
    """A checkpoint, or the last one of a run folder -> its dict.

    trap: torch.load without weights_only=True runs whatever code a stranger put into the file. With
    it tensors, numbers, strings, lists and dicts are read, and all else is refused."""
    path, need = Path(where), " or ".join(f"train-{k}" for k in kinds)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{flag_name} {where}: no checkpoint there; {need} makes one")
    try:
        with zipfile.ZipFile(path) as z:            # nothing in it is packed: it holds what it says
            if sum(part.file_size for part in z.infolist()) > path.stat().st_size:
                raise ValueError("it claims to be larger than it is")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError("made by another version of it")
        if not all(isinstance(state[part], kind) for part, kind in PARTS[state["kind"]].items()):
            raise ValueError("a part is of the wrong kind")
        if state["kind"] == "ldm" and not (
                {str} >= set(map(type, state["classes"])) and
                {int} >= set(map(type, state["class_counts"])) and
                len(state["classes"]) == len(state["class_counts"]) and
                state["scale"].shape == (2, state["vq"]["config"]["z_dim"]) and
                isinstance(state["vq"]["model"], dict)):
            raise ValueError("its parts do not fit")
        for part in [state, state["vq"]] if state["kind"] == "ldm" else [state]:
            part["config"] = check_values(COMMANDS["train-" + part["kind"]], part["config"])
    except Exception as e:              # unpickling junk raises nearly anything
        why = e if type(e) is ValueError else type(e).__name__
        raise UserError(f"{flag_name} {path}: not a whole checkpoint of this program ({why}); "
                        "nothing in it was run") from None
    if state["kind"] not in kinds:
        raise UserError(f"{flag_name} {path}: made by train-{state['kind']}; give one of {need}")
    return state

def load_weights(net, weights, path, **how):     # how: assign=True where net has no memory yet
    try:
        net.load_state_dict(weights, **how)
    except Exception as e:
        raise UserError(f"{path}: the weights do not fit the settings beside them; the file is "
                        f"damaged ({type(e).__name__})") from None
    return net

def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {path}: cannot make this folder ({e.strerror})") from None
    return Path(path)

def lock_folder(folder):
    """Two runs must not write into one folder. The system frees the lock of a killed process."""
    lock = FileLock(folder / ".lock", timeout=0)        # held until it is released or collected
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"--out {folder}: another run is writing there; use another") from None
    return lock

def quiet_bar(total, name, start=0):
    """A progress line in a terminal; none in a file, where report() says a line a minute."""
    return tqdm(total=total, initial=start, desc=name, leave=False, dynamic_ncols=True,
                disable=rank() > 0 or not sys.stderr.isatty(), mininterval=0.5,
                bar_format="{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}")

def batches(total, size, name):     # the numbers 0…total-1, `size` at a time, with a progress line
    with quiet_bar(total, name) as bar:
        for numbers in torch.arange(total).split(size):
            yield numbers
            bar.update(len(numbers))

def memory_gb(device):
    """Peak memory so far, of the GPU or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if os.name == "nt":
        return math.nan
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

def size_of(net):
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"

class Run:
    """One training run: folder, lock, checkpoint, log, clock, and the wish to stop."""
    def __init__(self, cfg, typed, kind):
        self.kind, self.folder, last = kind, Path(cfg.out), Path(cfg.out) / "last.pt"
        self.state, self.log, self.best = None, [], math.inf
        self.step, self.bad, self.signal, self.skipped = 0, 0, 0, False
        if last.exists() and not cfg.resume and not cfg.overwrite:
            raise UserError(f"--out {self.folder}: already holds a run; --resume goes on with it, "
                            "--overwrite replaces it, another --out leaves it alone")
        if cfg.resume and last.exists():
            self.state = load_checkpoint(last, [kind], "--resume")
            for name in ("log", "best", "step", "bad"):
                setattr(self, name, self.state[name])
            cfg = settings(type(cfg), typed, self.state["config"])
        elif cfg.resume:
            cfg.check()
            say(f"nothing to resume in {self.folder} yet: starting from the beginning")
        self.cfg = cfg
        if cfg.batch_size % world():
            raise UserError(f"--batch-size {cfg.batch_size}: no multiple of {world()} processes")
        self.device, self.dtype = pick_device(cfg)
        torch.manual_seed(cfg.seed)     # for the first weights: all else looks up its numbers

    def open(self, parts, rest, n):
        """The first writing, when all else is known to be right: lock the folder, clear away an old
        run (what it wrote, nothing else), or load {name: network or optimiser} from its checkpoint.
        rest: what else the stage wants kept. n: how many images to train on."""
        if rank() == 0:
            self.lock = lock_folder(make_folder(self.folder))
            for name in [".*.tmp", *([] if self.state else WRITTEN)]:   # .tmp: left by a killed run
                for p in self.folder.glob(name):
                    p.unlink()
        for name, part in parts.items() if self.state else ():
            load_weights(part, self.state[name], self.folder)
        self.parts, self.rest, self.n = parts, rest, n
        self.total = math.ceil(self.cfg.epochs * n / self.cfg.batch_size)

    def steps(self):
        """The one clock of a run: yields step numbers until all epochs, --minutes or a signal end
        it. Ctrl-C and SIGTERM only ask: the step is finished and saved. A second one kills."""
        cfg, self.first, self.looks, self.looking, self.waited = self.cfg, self.step, 0, 0.0, 0.0
        self.began = self.saved = self.spoke = time.monotonic()

        def ask(number, frame):
            self.signal = number
            signal.signal(number, before[number])
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = quiet_bar(self.total, f"train-{self.kind}", self.step)
        try:
            while self.step < self.total:
                now = [time.monotonic() - self.began, self.signal]
                if world() > 1:                     # all processes must see the same clock
                    now = torch.tensor(now, dtype=torch.float32, device=self.device)
                    dist.all_reduce(now, dist.ReduceOp.MAX)
                self.elapsed, self.signal = float(now[0]), int(now[1])
                if self.signal or cfg.minutes and self.elapsed > cfg.minutes * 60:
                    break
                yield self.step                     # report() counts it as done
                self.bar.update()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.bar.close()

    @property
    def epoch(self):                    # how many are complete
        return self.step * self.cfg.batch_size // self.n

    def done(self):                     # which part of the run, 0…1, by steps or by --minutes
        minutes = self.cfg.minutes
        return max(self.step / self.total, self.elapsed / (minutes * 60) if minutes else 0)

    def lr_factor(self):
        """Times each rate: up in the first --warmup steps, down to nearly 0 in the last part,
        --decay. Its length is --epochs or --minutes, whichever ends first: short runs come to
        rest too."""
        up = min(1.0, (self.step + 1) / (self.cfg.warmup + 1))
        return up * min(1.0, max(1 - self.done(), 0.01) / max(self.cfg.decay, 0.01))

    def indices(self):
        """Which of n images make up this step's batch: the next of an endless row of shuffles."""
        B, n = self.cfg.batch_size, self.n
        places = range(self.step * B, (self.step + 1) * B)
        order = {e: torch.randperm(n, generator=rng(self.cfg.seed, "order", e))
                 for e in {p // n for p in places}}
        return torch.stack([order[p // n][p % n] for p in places])

    def update(self, optimizer, params, losses):
        """After backward: average over processes, clip, step. False: this step was skipped.
        One bad batch must not end a night; five in a row mean divergence."""
        average_gradients(params)
        if math.isfinite(float(nn.utils.clip_grad_norm_(params, self.cfg.clip))):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.lr_factor()
            optimizer.step()
            return True
        self.bad, self.skipped = self.bad + 1, True
        names = [k for k, v in losses.items() if not v.isfinite()] or ["the gradient"]
        say(f"WARNING step {self.step}: {', '.join(names)} not finite; this step is skipped")
        if self.bad >= 5:
            raise UserError(f"step {self.step}: {', '.join(names)} not finite five times in a row. "
                            "The last checkpoint is untouched; start anew with a lower --lr")
        return False

    def report(self, losses, look, names=()):
        """Count the step; every LOG_EVERY steps a row of the log and the progress line. Measure,
        draw and save when it is time: once early, some ten times a run (with --minutes five
        more, at least a minute apart), and at the end. names: checkpoints wanted beside last.pt."""
        cfg, before, lr, names = self.cfg, self.epoch, self.cfg.lr * self.lr_factor(), [*names]
        self.step += 1
        self.bad, self.skipped = self.bad if self.skipped else 0, False     # five in a row count
        tenth = self.epoch > before and self.epoch % max(1, cfg.epochs // 10) == 0
        fifth = max(60, 12 * cfg.minutes) if cfg.minutes else math.inf      # of --minutes, in s
        looks, self.looks = self.looks, int(self.elapsed / fifth)
        due = tenth or self.looks > looks or self.step in (FIRST_LOOK, self.total)
        if due or self.step % LOG_EVERY == 0:
            values = torch.stack([v.detach().float().to(self.device) for v in losses.values()])
            row = dict(zip(losses, (sum_over_processes(values) / world()).tolist()))
            at = self.step * cfg.batch_size / self.n
            self.log.append(dict(step=self.step, epoch=at, lr=lr, **row))
            waiting = 100 * self.waited / (time.monotonic() - self.began)
            text = f"epoch {at:.1f} " + " ".join(f"{k} {v:.3g}" for k, v in row.items()) \
                + f" | {self.speed():.0f} img/s, {waiting:.0f} % waiting for data, " \
                f"{memory_gb(self.device):.1f} GB"
            self.bar.set_postfix_str(text, refresh=False)
            if self.bar.disable and time.monotonic() - self.spoke > 60:
                self.spoke = time.monotonic()
                say(f"step {self.step} of {self.total}, {text}")
        if due:
            self.show(look, names)
        if (due or names or time.monotonic() - self.saved > SAVE_EVERY) and not self.bad:
            self.save(names)

    def show(self, look, names):        # process 0 measures and draws; the clock of speed() stands
        if rank() == 0:
            began = time.monotonic()
            if (score := look()) < self.best:
                self.best = score
                names.append("best.pt")
            self.looking += time.monotonic() - began

    def speed(self):                    # images per second of training, in this session
        return (self.step - self.first) * self.cfg.batch_size \
            / (time.monotonic() - self.began - self.looking)

    def save(self, names):
        """All that the loop needs to go on, and what the stage wants kept."""
        if rank() == 0:
            whole = dict(format=FORMAT, kind=self.kind, config=asdict(self.cfg), step=self.step,
                         log=self.log, best=self.best, bad=self.bad, torch=str(torch.__version__),
                         speed=[self.speed(), memory_gb(self.device)], **self.rest,
                         **{name: part.state_dict() for name, part in self.parts.items()})
            for name in (*names, "last.pt"):    # in this order: a kill in between repeats them all
                write_whole(self.folder / name, lambda f: torch.save(whole, f))
            keys = list(dict.fromkeys(k for row in self.log for k in row))
            rows = [[f"{row[k]:.9g}" if k in row else "" for k in keys] for row in self.log]
            text = "".join(",".join(row) + "\n" for row in [keys, *rows]).encode()
            write_whole(self.folder / "log.csv", lambda f: f.write(text))
        self.saved = time.monotonic()

    def finish(self, look, note, then):
        """The last save and the last lines. -> exit status."""
        names, left = [], self.step < self.total
        if left and not self.signal:        # --minutes are over: where did we get?
            self.show(look, names)
        self.save(names)
        if rank() == 0:
            self.lock.release()
        if left:
            why = f"signal {self.signal}" if self.signal else f"--minutes {self.cfg.minutes:g}"
            say(f"stopped by {why} at step {self.step} of {self.total}, saved; the same command "
                "with --resume goes on")
        if self.signal:
            return 128 + self.signal
        if self.first >= self.total:
            note += f"nothing left to do, all {self.cfg.epochs} epochs were done; "
        say(f"{note}pictures are in {self.folder}. Next: python vqldm.py {then}")
        return 0

# ------------------------------------------------------------------------------------------------
# 9. Stage 1: training
# ------------------------------------------------------------------------------------------------
# Two players, one straight line. The generator (encoder, codebook, decoder) steps first, then D on
# the same images. In the beginning D is not called at all (from blobs it would learn only that blur
# is fake); shortly before gan_start it trains unheard, then its wish fades in.
# run is section 8's: run.steps() counts the steps, run.indices() says which images are next,
# run.update() clips the gradients and steps, run.report() logs, draws and saves.
# What to look at: rec and perc fall, codes used and perplexity rise. With the GAN on, D(real) stays
# above 0 and D(fake) below, within ±1: both at 0, D is blind; beyond ±1, D has won.

@torch.no_grad()
def measure_vq(vqgan, images, indices, perceptual, device, dtype):
    """Reconstruct images. -> (means by name, code counts (K,), uint8 originals, copies)."""
    sums, usage, pairs = {}, torch.zeros(vqgan.codebook.embedding.num_embeddings), []
    for idx in indices.split(50):
        x = images.batch(idx).to(device)
        with autocast(device, dtype):
            k = vqgan.codebook.nearest(vqgan.encode(x))
            x_hat = vqgan.decoder(vqgan.codebook.lookup(k)).clamp(-1, 1)
        usage += torch.bincount(k.flatten(), minlength=len(usage)).cpu()
        u, v = (x + 1) / 2, (x_hat + 1) / 2
        one = dict(psnr=-10 * (u - v).square().flatten(1).mean(1).clamp(min=1e-10).log10().mean(),
                   ssim=ssim(u, v), rec=F.mse_loss(x_hat, x))
        if perceptual:
            one["lpips"] = perceptual(x, x_hat)
        sums = {s: sums.get(s, 0) + float(m) * len(idx) / len(indices) for s, m in one.items()}
        pairs.append((to_bytes(x), to_bytes(x_hat)))
    p = usage / usage.sum()
    sums.update(codes_used_percent=100 * float((usage > 0).float().mean()), n=len(indices),
                perplexity=float(torch.exp(-torch.xlogy(p, p).sum())))
    return sums, usage, *(torch.cat(side) for side in zip(*pairs))

def ssim(u, v):
    """Structural similarity (Wang et al. 2004) of images in 0…1: Gaussian window 11×11, σ 1.5."""
    w = torch.exp(-(torch.arange(11.0) - 5) ** 2 / 4.5)
    w = (w[:, None] * w / w.sum() ** 2).expand(3, 1, 11, 11).to(u)
    mu, mv, uu, vv, uv = (F.conv2d(i, w, groups=3, padding=5 if i.shape[-1] < 22 else 0)
                          for i in (u, v, u * u, v * v, u * v))
    suu, svv, suv = uu - mu * mu, vv - mv * mv, uv - mu * mv
    return ((2 * mu * mv + 1e-4) * (2 * suv + 9e-4)
            / (mu ** 2 + mv ** 2 + 1e-4) / (suu + svv + 9e-4)).mean()

def gan_trouble(log):
    """What the last rows of a log say about the two players, in plain words; '' if all is well."""
    rows = [row for row in log if "d_real" in row][-10:]
    if len(rows) < 10:
        return ""
    real, fake, lam = (sum(r.get(k, 0.0) for r in rows) / 10 for k in ("d_real", "d_fake", "lam"))
    if real > 1 and fake < -1:
        return f"D has won, D(real) {real:.1f} and D(fake) {fake:.1f}; a lower --d-lr may help"
    if real - fake < 0.05:
        return "D is blind, the same for real and fake; a higher --d-lr or --d-widths may help"
    return "lam is near its cap, 1e4: D has hardly a gradient" if lam > 5e3 else ""

def train_vq(cfg, typed):
    """Stage 1, from images to a checkpoint."""
    run = Run(cfg, typed, "vq")
    cfg, device, dtype = run.cfg, run.device, run.dtype
    images = get_images(cfg, cfg.data, cfg, run.state)
    layout = dict(device=device, memory_format=torch.channels_last)     # bf16 on a CPU: 7 % faster
    vqgan = VQGAN(cfg.widths, cfg.z_dim, cfg.codes, cfg.heads).to(**layout)
    disc = PatchDiscriminator(cfg.d_widths).to(**layout)
    # Adam divides by the gradient's size, so no loss weight makes a code move faster than its
    # learning rate. At the networks' own, the codes lag behind the moving z: 0.8 dB (d 4, K 512).
    codes = {vqgan.codebook.embedding.weight: cfg.codes_lr}
    opt = make_optimizer(vqgan, cfg.lr, (0.9, 0.99), cfg.muon_lr, codes)
    opt_d = make_optimizer(disc, cfg.d_lr, (0.5, 0.9))
    n, B = len(images.train), cfg.batch_size
    # After the networks, whose first weights must not depend on whether LPIPS can be had. A resumed
    # run keeps the loss that it began with, even if the weights can be had only now.
    perceptual, lpips_name = load_perceptual(run.state["lpips"] if run.state else cfg.lpips, device)
    run.open(dict(model=vqgan, disc=disc, opt=opt, opt_d=opt_d),
             dict(lpips=lpips_name, data=images.key), n)
    forward = torch.compile(vqgan) if cfg.compile else vqgan
    if cfg.compile:     # lam (6) walks from x_hat to the last layer twice: keep what that needs
        torch._functorch.config.donated_buffer = False
    params, params_d, last = [*vqgan.parameters()], [*disc.parameters()], vqgan.decoder.last.weight
    book, steps = vqgan.codebook, run.total
    gan_at = round(cfg.gan_start * n / B) if cfg.gan_weight else math.inf
    d_at, ramp = gan_at - round(cfg.d_warmup * n / B), max(1, round(cfg.gan_ramp * n / B))
    say(f"VQGAN {size_of(vqgan)}, D {size_of(disc)}; {cfg.epochs} epochs = {steps} steps of {B}; "
        f"{f'GAN from step {gan_at}' if gan_at < steps else 'no GAN'}; LPIPS {lpips_name}; "
        f"writing to {run.folder}")
    if (tokens := (cfg.size // cfg.f) ** 2) > 4096:
        say(f"WARNING attention over {tokens:,} tokens, whose cost grows with their square, will "
            "take most of a step; one more of --widths leaves a quarter of them")
    if steps < 500 and cfg.preset != "tiny":
        say(f"WARNING {steps} steps are too few to learn much; 1,000 and more is the rule")

    def look():
        m, usage, x, x_hat = measure_vq(vqgan, images, images.held[:256], perceptual, device, dtype)
        run.log.append(dict(step=run.step, **{f"held_{k}": v for k, v in m.items()}))
        say(f"epoch {run.epoch:3d}, step {run.step}: held-out PSNR {m['psnr']:.2f} dB, SSIM "
            f"{m['ssim']:.3f}, " + (f"LPIPS {m['lpips']:.3f}, " if perceptual else "")
            + f"codes used {m['codes_used_percent']:.0f} %, perplexity {m['perplexity']:.0f}")
        if m["codes_used_percent"] < 25 and run.epoch > 1:
            say("WARNING few codes are used; a higher --codes-lr or lower --revive-every may help")
        if trouble := gan_trouble(run.log):
            say(f"WARNING {trouble}")
        draw_rows(run.folder / f"recon_epoch_{run.epoch:03d}.png",
                  {"original": x[:8], "reconstruction": x_hat[:8]})
        draw_curves(run.folder / "curves.png", run.log, VQ_CURVES)
        draw_usage(run.folder / "codebook.png", usage)
        return m["rec"] + cfg.perceptual_weight * m.get("lpips", 0)

    if rank() == 0 and not run.state:
        first = {c: images.train[images.kinds == i][:8] for i, c in enumerate(images.classes[:12])}
        draw_rows(run.folder / "data_preview.png", {c: images.rows(r) for c, r in first.items()})
    for step in run.steps():
        # ---- learn: the generator ---------------------------------------------------------------
        tick = time.monotonic()
        turns = torch.randint(8, (B,), generator=rng(cfg.seed, "turns", step))
        x = images.batch(images.train[share(run.indices())], share(turns)).to(device)   # (B,3,H,W)
        x = x.contiguous(memory_format=torch.channels_last)
        run.waited += time.monotonic() - tick
        if step == 0:                   # the codes start as encoder outputs
            with torch.no_grad(), autocast(device, dtype):
                book.revive(vqgan.encode(x), torch.ones(cfg.codes, dtype=torch.bool), rng(cfg.seed))
        with autocast(device, dtype):
            x_hat, z, k, codebook_loss, commit_loss = forward(x)
        rec = F.mse_loss(x_hat, x)
        perc = perceptual(x, x_hat) if perceptual else torch.zeros(())
        losses = dict(rec=rec, perc=perc, codebook=codebook_loss, commit=commit_loss)
        l_rec = rec + cfg.perceptual_weight * perc
        l_vq = cfg.codebook_weight * codebook_loss + cfg.commit_weight * commit_loss
        opt.zero_grad()
        if step < gan_at:
            (l_rec + l_vq).backward()                                                          # (5)
        else:
            # trap: a plain backward of g_adv also fills D's gradients; zeroed too late, they make
            # D(fake) settle at 0.65 instead of below 0. Here D's graph is walked to x_hat only.
            with autocast(device, dtype):
                g_adv = -disc(x_hat).mean()                                                    # (7)
            lam, d_rec, d_gan = adaptive_weight(l_rec, g_adv, x_hat, last)
            weight = cfg.gan_weight * min(1.0, (step - gan_at + 1) / ramp) * lam
            torch.autograd.backward([x_hat, l_vq], [d_rec + weight * d_gan, None])             # (5)
            losses.update(g_adv=g_adv, lam=lam)
        if run.update(opt, params, losses):
            book.count(k)
            if (step + 1) % cfg.revive_every == 0:
                book.revive(z, book.usage == 0, rng(cfg.seed, "revive", step))
            # ---- learn: the discriminator -------------------------------------------------------
            if step >= d_at:
                with autocast(device, dtype):
                    # trap: without detach, D's loss would teach the generator to give itself away.
                    real, fake = disc(torch.cat([x, x_hat.detach()])).chunk(2)
                d_loss = hinge_loss(real, fake)                                                # (7)
                opt_d.zero_grad()
                d_loss.backward()
                losses.update(d_loss=d_loss, d_real=real.mean(), d_fake=fake.mean())
                run.update(opt_d, params_d, losses)
        # ---- report -----------------------------------------------------------------------------
        run.report(losses, look, ["pre_gan.pt"] if step + 1 == gan_at else [])
    note = "" if perceptual or cfg.lpips == "off" else "trained WITHOUT LPIPS; "
    return run.finish(look, note, f"train-ldm --vq {shlex.quote(run.folder.as_posix())}")

# ------------------------------------------------------------------------------------------------
# 10. Stage 2: diffusion
# ------------------------------------------------------------------------------------------------
# Noise is added to a latent in T small steps until nothing is left of it; a network learns to say
# what was added; sampling walks back. All of the mathematics is in this class, and none of it knows
# what the network looks like. The network may answer with eps or with v; predict() turns either
# into (z0_hat, eps_hat), and the samplers know only these two.

class Diffusion:
    """DDPM's noise schedule, its loss (Algorithm 1), its samplers (Algorithm 2, DDIM and DPM).

    beta, alpha, alpha_bar: (T,), made in float64; index t = 0 is the least noise. ValueError for a
    word that it does not know or a T too small to end in noise."""
    def __init__(self, T=LDMConfig.T, schedule=LDMConfig.schedule, target=LDMConfig.target):
        self.T, self.target = T, target
        if target not in ("v", "eps"):
            raise ValueError(f"target {target!r}: must be v or eps")
        if schedule == "linear":
            # trap: 1e-4 and 0.02 belong to T = 1000. Unscaled, T = 50 ends at alpha_bar = 0.60, and
            # sampling starts from a noise that the network never saw.
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        elif schedule == "cosine":                      # Nichol & Dhariwal 2021, 2102.09672, eq. 17
            t = torch.arange(T + 1, dtype=torch.float64) / T
            f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"schedule {schedule!r}: must be linear or cosine")
        beta = beta.clamp(max=0.999)
        alpha_bar = torch.cumprod(1 - beta, 0)                                # (T,)          (8)
        if alpha_bar[-1] > 0.01:
            raise ValueError(f"T = {T}: alpha_bar ends at {alpha_bar[-1]:.2f}, not near 0")
        self.beta, self.alpha, self.alpha_bar = (a.float() for a in (beta, 1 - beta, alpha_bar))

    def at(self, t, z):
        """alpha_bar_t, shaped to multiply z; at t = -1, before all noise, it is 1."""
        a = torch.cat([self.alpha_bar, torch.ones(1)]).to(z.device)[t]        # [-1]: the 1
        return a.view(-1, *[1] * (z.dim() - 1))

    def add_noise(self, z0, t, eps):
        """q(z_t | z0) in one go: (B,d,h,w), (B,), (B,d,h,w) -> z_t."""
        a = self.at(t, z0)
        return a.sqrt() * z0 + (1 - a).sqrt() * eps                                           # (9)

    def loss(self, net, z0, t, eps, label=None):
        """Algorithm 1: each image's squared error, (B,). A net that predicts nothing has 1."""
        a = self.at(t, z0)
        goal = eps if self.target == "eps" else a.sqrt() * eps - (1 - a).sqrt() * z0          # (12)
        out = net(self.add_noise(z0, t, eps), t, label).float()
        return (out - goal).square().flatten(1).mean(1)                                       # (10)

    def weight(self, t):
        """How much each t (B,) counts in training: 1 where signal and noise are equal, 1/4 at both
        ends. There the loss stays large whatever is learnt: at little noise it asks for detail
        finer than a code, which decoding rounds away, at much noise for what cannot be seen in z_t.
        v's loss is the sum of the squared errors of z0 and of eps; (15) makes of it twice their
        geometric mean. After equal steps, without the 1/4: Fréchet 753 instead of 837.
        trap: with 0 at the ends nobody teaches the answer to pure noise, which is the mean of the
        data and where all sampling starts: it held half of the dark rims of the images."""
        a = self.at(t, t)
        return (2 * (a * (1 - a)).sqrt()).clamp(min=0.25)                                     # (15)

    def predict(self, out, z_t, t):
        """The network's answer, eps or v -> (z0_hat, eps_hat).
        trap: from eps, z0_hat divides the network's error by √alpha_bar, 1/157 (linear) or
        1/20,291 (cosine) at t = T-1: the latents' std was 1.8 to 3.3 instead of 1. v never divides.
        trap: no clipping of z0_hat to ±1; latents are no pixels, their std would fall to 0.68."""
        a = self.at(t, z_t)
        if self.target == "eps":
            return (z_t - (1 - a).sqrt() * out) / a.sqrt(), out                               # (9)
        return a.sqrt() * z_t - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * z_t   # (12)

    def pairs(self, steps, levels=None):
        """Exactly `steps` pairs (t, t_prev), from levels-1 to -1, for 1 <= steps <= levels <= T.
        Their strides grow: the large things are decided in the few noisiest levels.
        trap: range(0, T, T // steps) gives too many or too few for most numbers of steps."""
        levels = levels or self.T
        t = [levels - 1 - max(i, round(levels * (i / steps) ** 2)) for i in range(steps)]
        return list(zip(t, [*t[1:], -1]))

    @torch.no_grad()
    def sample(self, net, z, steps, sampler=Sampling.sampler, eta=Sampling.eta, noise=None,
               levels=None):
        """Walk back from z: standard normal (B,d,h,w), or latents noised to `levels` levels.
        net(z_t, t) -> eps or v; noise() -> numbers like z. Yields (z_t, z0_hat) after each step.

        ddpm takes random steps, which should be many and small. ddim at eta 0 walks one smooth
        path, which bears long strides, as if z0_hat stayed the same along each. dpm (DPM-Solver++
        2M) lets z0_hat go on as it went in the last stride: on synthetic data 25 steps give a
        Fréchet distance of 505 and latents of std .96, 50 of ddim's 517 and .94.
        trap: kept steps are further apart than the trained ones, so alpha_t of (11) is made anew
        from them. With the trained alpha_t, 50 steps would stop half way, in noise."""
        noise, last = noise or (lambda: torch.randn_like(z)), None
        if sampler not in ("dpm", "ddim", "ddpm"):
            raise ValueError(f"sampler {sampler!r}: must be dpm, ddim or ddpm")
        for t, prev in self.pairs(steps, levels):
            t_all = torch.full((len(z),), t, device=z.device)                 # (B,)
            a, a_prev = self.at(t, z), self.at(prev, z)     # alpha_bar, here and there
            alpha, sigma = a / a_prev, torch.zeros(())
            z0_hat, eps_hat = self.predict(net(z, t_all).float(), z, t_all)
            ahead = z0_hat
            if sampler == "ddpm":
                sigma = (1 - alpha).sqrt()          # sigma² = beta_t (DDPM sec. 3.2)
                z = (z - (1 - alpha) / (1 - a).sqrt() * eps_hat) / alpha.sqrt()               # (11)
            else:
                if sampler == "dpm":
                    s = (a_prev / (1 - a_prev) * (1 - a) / a).log() / 2       # last step: infinite
                    if last and prev >= 0:
                        ahead = z0_hat + s / (2 * last[0]) * (z0_hat - last[1])               # (16)
                        eps_hat = (z - a.sqrt() * ahead) / (1 - a).sqrt()                      # (9)
                    last = s, z0_hat
                else:           # eta 0: a fixed path; 1: DDPM with its smaller sigma (DDIM eq. 16)
                    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - alpha)).sqrt()
                rest = (1 - a_prev - sigma ** 2).clamp(min=0).sqrt()
                z = a_prev.sqrt() * ahead + rest * eps_hat                                    # (13)
            if prev >= 0 and float(sigma) > 0:
                # trap: noise after the last step leaves a grain, 0.01 to 0.08, in every sample.
                z = z + sigma * noise()                                                # (11), (13)
            yield z, z0_hat

# ------------------------------------------------------------------------------------------------
# 11. Stage 2: the UNet
# ------------------------------------------------------------------------------------------------
# The same bricks as the VQGAN. New are the time (how noisy is z_t?), which every ResBlock gets, and
# the skips, which carry fine detail past the bottleneck: noise has no short description.

def time_embedding(t, dim):
    """t (B,) -> (B,dim): sines and cosines of growing period, as in the Transformer."""
    freq = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freq                                     # (B,dim/2)
    return torch.cat([angle.sin(), angle.cos()], 1)

class UNet(nn.Module):
    """(z_t, t, class) -> eps_hat or v_hat (B,d,h,w). Class number n_classes means: not told."""
    def __init__(self, z_dim, widths, heads, n_classes=0):
        super().__init__()
        self.width, self.n_classes, E = 2 * (widths[0] // 2 or 1), n_classes, 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(self.width, E), nn.SiLU(), nn.Linear(E, E))
        self.label = nn.Embedding(n_classes + 1, E) if n_classes else None
        self.first = nn.Conv2d(z_dim, widths[0], 3, padding=1)
        self.down = nn.ModuleList(DownBlock(a, b, E) for a, b in zip((widths[0], *widths), widths))
        self.mid = MidBlock(widths[-1], heads, E)
        self.up = nn.ModuleList(UpBlock(a, b, E, c_skip=a)
                                for a, b in zip(widths[::-1], (*widths[-2::-1], widths[0])))
        self.norm, self.last = Norm(widths[0]), zero(nn.Conv2d(widths[0], z_dim, 3, padding=1))

    def forward(self, z_t, t, label=None):                                # (B,d,h,w), (B,), (B,)
        emb = self.time(time_embedding(t, self.width))                    # (B,E)
        if self.label is not None:      # the class joins the time: blocks need not know of classes
            emb = emb + self.label(torch.full_like(t, self.n_classes) if label is None else label)
        y, skips = self.first(z_t), []
        for block in self.down:
            y, skip = block(y, emb)                                       # the grid halves
            skips.append(skip)
        y = self.mid(y, emb)
        for block in self.up:
            y = block(y, emb, skips.pop())                                # the grid doubles
        return self.last(F.silu(self.norm(y)))                            # (B,d,h,w)

def guided(net, guide, label, w, below=math.inf):
    """Guidance (14): a net(z_t, t) that goes w times the way from what `guide` answers to what net
    does, where t < below. All of t (B,) are equal, as in sampling.

    The guide is the network as it was early in its training (autoguidance, Karras 2024), and is not
    told the class (classifier-free guidance, CFG). Why: a briefly trained network blurs what it is
    unsure of, a younger one in the same places and more. The way from the one to the other is what
    training and the class have added; w = 2 adds it once more. One network, below .8 T: Fréchet 449
    and latents' std 1.01; with the network as its own guide, not told the class, 542 and .94.
    trap: above, where the large things are decided, guidance prefers what shows the class best, and
    too much of it. Guided everywhere the same network has 509 and 1.11 (Kynkäänniemi 2024,
    2404.07724, found the same in FID)."""
    if w == 0:                  # not the guide alone, as (14) would have it: no class, no guidance
        return net

    def further(z_t, t):
        strong = net(z_t, t, label)
        if w == 1 or t[0] >= below:
            return strong
        weak = guide(z_t, t).float()
        return weak + w * (strong.float() - weak)                                             # (14)
    return further

# ------------------------------------------------------------------------------------------------
# 12. Stage 2: training
# ------------------------------------------------------------------------------------------------
# The frozen encoder turns each image into a latent once; after that stage 2 never sees a pixel.
# Diffusion ends in noise of mean 0 and std 1, so latents are brought there too, with the mean and
# std of the whole cache. These live in the checkpoint: a latent is meaningless without them.

def standardise(z, scale):
    """z -> z0. scale (2,d): mean and std of each channel. Applied here and below, nowhere else.
    trap: a copied constant, or one side forgotten, gives grey mush or noise."""
    return (z - scale[0].view(-1, 1, 1)) / scale[1].view(-1, 1, 1)

def unstandardise(z0, scale):
    return z0 * scale[1].view(-1, 1, 1) + scale[0].view(-1, 1, 1)

def cache_latents(vqgan, images, views, cfg, device, dtype):
    """Encode all images in `views` of the 8 symmetries -> (path of a float32 .npy in which row
    view·n + i is image i of n, scale (2,d)).

    trap: encoder outputs have heavy tails, single values at 12 to 26 std, and the UNet would spend
    itself on them. Only the nearest code of z counts in the end, so z is first settled near it."""
    weights = digest(b"".join(w.cpu().numpy().tobytes() for w in vqgan.state_dict().values()))
    path = Path(cfg.cache) / f"latents-{images.key}-{weights:016x}-{views}.npy"
    if not (path.exists() and path.with_suffix(".json").exists()):
        n, d = len(images.names), vqgan.codebook.embedding.embedding_dim
        train = torch.zeros(n, dtype=torch.bool).index_fill_(0, images.train, True)
        sums = torch.zeros(3, d, dtype=torch.float64)                     # count, Σz, Σz²
        shape = (views * n, d, *[images.size // vqgan.f] * 2)

        def encoded(rows):
            i = rows % n
            x = images.batch(i, rows // n).to(device)
            with autocast(device, dtype):
                z = vqgan.codebook.settle(vqgan.encode(x)).cpu()                        # (B,d,h,w)
            v = rearrange(z[train[i]].double(), "B d h w -> d (B h w)")
            sums.add_(torch.stack([torch.full((d,), v.shape[1]), v.sum(1), v.square().sum(1)]))
            return z.numpy()
        write_npy(path, np.float32, shape, 64, encoded, "encoding")
        mean, square = sums[1:] / sums[0]
        scale = torch.stack([mean, (square - mean ** 2).clamp(min=1e-12).sqrt()]).tolist()
        write_whole(path.with_suffix(".json"), lambda f: f.write(json.dumps(scale).encode()))
    return path, torch.tensor(json.loads(path.with_suffix(".json").read_text()))

@torch.no_grad()        # trap: without it the mean carries the history of all steps: memory grows
def update_ema(ema, net, step, decay):
    """EMA, exponential moving average: ema <- decay·ema + (1-decay)·net. The last 1/(1-decay) steps
    together stray less than any one.
    trap: without the decay's own warm-up, after 1,000 steps at 0.9999 the mean is still 90 % first
    weights, and samples are noise."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)

def build_vqgan(state, device, path):
    """The frozen VQGAN of a stage-1 state, and its settings."""
    c = VQConfig(**state["config"])
    with torch.device("meta"):          # no memory yet: a stranger's settings may ask for any size
        vqgan = VQGAN(c.widths, c.z_dim, c.codes, c.heads)
    load_weights(vqgan, state["model"], path, assign=True).float().eval().requires_grad_(False)
    return vqgan.to(device, memory_format=torch.channels_last), c

class Generator:
    """All that sampling needs, from a stage-2 state: the UNet's EMA, its guide, Diffusion, VQGAN,
    scale."""
    def __init__(self, state, device, dtype, path):
        self.cfg, self.device, self.dtype = LDMConfig(**state["config"]), device, dtype
        self.vqgan, self.vq_cfg = build_vqgan(state["vq"], device, path)
        self.diffusion = Diffusion(self.cfg.T, self.cfg.schedule, self.cfg.target)
        self.classes = state["classes"] if state["conditional"] else []
        self.class_counts, self.scale = state["class_counts"], state["scale"].to(device)
        with torch.device("meta"):
            nets = [UNet(self.vq_cfg.z_dim, self.cfg.unet_widths, self.cfg.heads,
                         len(self.classes)) for _ in range(2)]
        self.net, self.guide = (
            load_weights(net, state[name], path, assign=True).eval().requires_grad_(False).float()
            .to(device, memory_format=torch.channels_last)
            for net, name in zip(nets, ("ema", "guide")))
        self.shape = (self.vq_cfg.z_dim, *[self.vq_cfg.size // self.vq_cfg.f] * 2)

    def noise_of(self, seed, numbers):
        """A function that draws the next noise (n,d,h,w) of these images. Each image has its own
        generator: it is the same in any batch and for any --n."""
        own = [rng(seed, "sample", int(i)) for i in numbers]
        return lambda: torch.stack([torch.randn(self.shape, generator=g)
                                    for g in own]).to(self.device)

    def __call__(self, s, numbers, label=None, z=None, levels=None):
        """Images `numbers` of the seed in s (Sampling), of classes label (n,). z: where to start,
        latents noised to `levels` levels; None: from noise alone.
        -> uint8 (n,3,H,W), and a list of (z_t, z0_hat) after each step."""
        noise, levels = self.noise_of(s.seed, numbers), levels or self.cfg.T
        label = None if label is None else label.to(self.device)
        net = guided(self.net, self.guide, label, s.guidance, s.guide_below * self.cfg.T)
        with autocast(self.device, self.dtype):
            z = noise() if z is None else z
            steps = list(self.diffusion.sample(net, z, min(s.steps, levels), s.sampler, s.eta,
                                               noise, levels))
        return self.decode(steps[-1][0]), steps

    def many(self, s, numbers, label):
        """The same in batches, with a progress line. -> uint8 (n,3,H,W), their z0 (n,d,h,w)."""
        done = []
        for i in batches(len(numbers), 32, "sampling"):
            x, steps = self(s, numbers[i], None if label is None else label[i])
            done.append((x, steps[-1][0].float().cpu()))
        return [torch.cat(part) for part in zip(*done)]

    def decode(self, z0):
        with autocast(self.device, self.dtype):
            return to_bytes(self.vqgan.decode(unstandardise(z0, self.scale)))

    def encode(self, x):
        """Images (B,3,H,W) in [-1,1] -> z0, as in training."""
        with autocast(self.device, self.dtype):
            z = self.vqgan.codebook.settle(self.vqgan.encode(x.to(self.device)))
        return standardise(z, self.scale)

    def labels(self, numbers):
        """Classes for image numbers, in the training set's proportions; None without classes. Steps
        of the golden ratio, modulo 1, fill 0…1 evenly, however many they are: no luck in it."""
        if not self.classes:
            return None
        edges = torch.tensor(self.class_counts).double().cumsum(0) / sum(self.class_counts)
        u = (torch.as_tensor(numbers).double() * 0.6180339887498949 + 0.5) % 1                # (n,)
        return torch.searchsorted(edges, u, right=True).clamp(max=len(edges) - 1)

GUIDE_STEPS = 500       # the guide's least age. After 179 steps, on ISIC: Fréchet 405, not 333

def train_ldm(cfg, typed):
    """Stage 2, from a stage-1 checkpoint to one that is all that sample needs."""
    run = Run(cfg, typed, "ldm")
    cfg, device, dtype = run.cfg, run.device, run.dtype
    vq = run.state["vq"] if run.state else load_checkpoint(cfg.vq, ["vq"], "--vq")
    vqgan, vq_cfg = build_vqgan(vq, device, cfg.vq)
    h = vq_cfg.size // vq_cfg.f
    if h % 2 ** len(cfg.unet_widths):
        raise UserError(f"--unet-widths: {len(cfg.unet_widths)} of them are too many for {h}×{h} "
                        f"latents, which can be halved {(h & -h).bit_length() - 1} times")
    images = get_images(cfg, cfg.data or vq_cfg.data, vq_cfg, run.state)
    latents, scale = first_then_others(
        lambda: cache_latents(vqgan, images, cfg.views, cfg, device, dtype))
    diffusion = Diffusion(cfg.T, cfg.schedule, cfg.target)
    n_classes = len(images.classes) if cfg.class_cond and len(images.classes) > 1 else 0
    net = UNet(vq_cfg.z_dim, cfg.unet_widths, cfg.heads, n_classes)
    net.to(device, memory_format=torch.channels_last)
    ema, guide = (copy.deepcopy(net).requires_grad_(False).eval() for _ in range(2))
    opt = make_optimizer(net, cfg.lr, (0.9, 0.99), cfg.muon_lr)
    B = cfg.batch_size
    counts = torch.bincount(images.kinds, minlength=len(images.classes))
    rest = dict(scale=scale, classes=images.classes, class_counts=counts.tolist(),
                conditional=n_classes > 0, data=images.key,
                guide_grows=run.state["guide_grows"] if run.state else True,
                vq={k: vq[k] for k in ("kind", "config", "model")})
    run.open(dict(model=net, ema=ema, guide=guide, opt=opt), rest, len(images.train))
    forward, params = torch.compile(net) if cfg.compile else net, [*net.parameters()]
    say(f"UNet {size_of(net)}; {h}×{h}×{vq_cfg.z_dim} latents, {n_classes or 'no'} classes, target "
        f"{cfg.target}; {cfg.epochs} epochs = {run.total} steps of {B}; writing to {run.folder}")

    def read(rows, views):
        rows = np.load(latents, mmap_mode="r")[(views * len(images.names) + rows).numpy()]
        return standardise(torch.from_numpy(rows), scale).to(device)

    def look():             # held-out loss by quarter of t, always with the same t and noise
        rows, loss = images.held[torch.arange(256) % len(images.held)], []
        eps = torch.randn(256, vq_cfg.z_dim, h, h, generator=rng(cfg.seed, "held-out"))
        given = read(rows, 0), torch.arange(256) * cfg.T // 256, eps, images.labels[rows]
        for quarter in zip(*(a.to(device).split(64) for a in given)):
            with torch.no_grad(), autocast(device, dtype):
                loss.append(diffusion.loss(ema, *quarter).mean())
        parts = {f"held_t{j + 1}of4": float(v) for j, v in enumerate(loss)}
        mean = sum(parts.values()) / 4
        run.log.append(dict(step=run.step, held_loss=mean, **parts))
        say(f"epoch {run.epoch:3d}, step {run.step}: held-out loss {mean:.3f} (1 = nothing "
            f"learnt); from little to much noise {' '.join(f'{v:.3f}' for v in parts.values())}")
        state = dict(rest, ema=ema.state_dict(), guide=guide.state_dict(), config=asdict(cfg))
        make = Generator(state, device, dtype, run.folder)
        some = torch.arange(16) * n_classes // 16 if n_classes else None
        x, _ = make(Sampling(seed=cfg.seed), range(16), some)
        draw_rows(run.folder / f"samples_epoch_{run.epoch:03d}.png", {f"epoch {run.epoch}": x})
        draw_curves(run.folder / "curves.png", run.log, LDM_CURVES)
        return mean

    for step in run.steps():
        # ---- learn ------------------------------------------------------------------------------
        tick, g = time.monotonic(), rng(cfg.seed, "step", step)
        rows = images.train[run.indices()]
        if cfg.balance:
            rows = images.train[torch.multinomial(1 / counts[images.kinds], B, True, generator=g)]
        # Each t equally likely, but one from each B-th part of 0…T-1: a steadier loss.
        # trap: t from 1…T-1 or 0…T-2 leaves a step that is sampled but was never trained.
        t = (torch.arange(B) * cfg.T + torch.randint(cfg.T, (B,), generator=g)) // B    # (B,)
        eps = torch.randn(B, vq_cfg.z_dim, h, h, generator=g)                           # (B,d,h,w)
        hide, views = torch.rand(B, generator=g), torch.randint(cfg.views, (B,), generator=g)
        label = torch.where(hide < cfg.label_drop, n_classes, images.labels[rows])      # (B,)
        z0 = read(share(rows), share(views))                                            # (B,d,h,w)
        t, eps, label = (share(a).to(device) for a in (t, eps, label))
        run.waited += time.monotonic() - tick
        with autocast(device, dtype):
            loss = diffusion.loss(forward, z0, t, eps, label)                       # (10) (B,)
        opt.zero_grad()
        (loss * (diffusion.weight(t) if cfg.weighting == "middle" else 1)).mean().backward()
        losses = dict(loss=loss.mean())             # told unweighted: 1 = nothing learnt
        if run.update(opt, params, losses):
            update_ema(ema, net, step, cfg.ema)
            rest["guide_grows"] &= step < GUIDE_STEPS or run.done() < cfg.guide_age
            if rest["guide_grows"]:             # from then on it stays, on --resume too
                guide.load_state_dict(ema.state_dict())
        # ---- report -----------------------------------------------------------------------------
        run.report(losses, look)
    return run.finish(look, "", f"sample --ckpt {shlex.quote(run.folder.as_posix())}")

# ------------------------------------------------------------------------------------------------
# 13. Pictures and samples
# ------------------------------------------------------------------------------------------------
# What a run leaves to look at. matplotlib is imported only where a picture is drawn.

VQ_CURVES = {"losses": dict(rec="‖x - x̂‖²", perc="LPIPS", codebook="codebook = commitment"),
             "GAN": dict(d_real="D(real)", d_fake="D(fake)", d_loss="hinge"), "λ": dict(lam="λ"),
             "held-out PSNR, dB": dict(held_psnr=""), "perplexity": dict(held_perplexity="")}
LDM_CURVES = {"loss, 1 = nothing learnt": dict(loss="training", held_loss="held out"),
              "by quarter of t, 1 = nothing learnt": dict(held_t1of4="least noise", held_t2of4="2",
                                                       held_t3of4="3", held_t4of4="most noise")}

@contextlib.contextmanager
def figure(path, size, nrows=1, ncols=1, heights=None):
    """with figure(...) as axes: draw on them; at the end they become a PNG."""
    from matplotlib.figure import Figure    # not pyplot: needs no window, changes no global
    fig = Figure(figsize=size, dpi=100, layout="constrained")
    yield fig.subplots(nrows, ncols, squeeze=False, height_ratios=heights).flatten()
    write_whole(Path(path), lambda f: fig.savefig(f, format="png", bbox_inches="tight"))

def draw_rows(path, rows):
    """{label: uint8 images (n,3,H,W)} -> a picture with a labelled strip for each, without axes."""
    from torchvision.utils import make_grid
    rows = {label: images for label, images in rows.items() if len(images)}
    columns = min(8, max(len(images) for images in rows.values()))
    lines = [-(-len(images) // columns) for images in rows.values()]
    size = columns + 0.2 + 0.085 * max(map(len, rows)), sum(lines) * 1.02 + 0.1
    with figure(path, size, nrows=len(rows), heights=lines) as axes:
        for ax, (label, images) in zip(axes, rows.items()):
            blank = images.new_full((-len(images) % columns, *images.shape[1:]), 255)
            gap = max(1, images.shape[2] // 32)
            grid = make_grid(torch.cat([images, blank]), columns, gap, pad_value=255)
            ax.imshow(grid.permute(1, 2, 0).numpy())
            ax.set_ylabel(label, rotation=0, ha="right", va="center")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)

def draw_curves(path, log, panels):
    panels = {t: keys for t, keys in panels.items() if any(k in row for row in log for k in keys)}
    with figure(path, (3.8 * len(panels), 2.8), ncols=len(panels)) as axes:
        for ax, (title, keys) in zip(axes, panels.items()):
            for key, name in keys.items():
                points = [(row["step"], row[key]) for row in log if key in row]
                marker = "." if "held" in key else None
                ax.plot(*zip(*points or [(0, math.nan)]), lw=1.2, label=name, marker=marker)
            ax.set_title(title, fontsize=10)
            ax.set(xlabel="step", yscale="log" if title in ("losses", "λ") else "linear")
            if "1 = nothing" in title:
                ax.set_ylim(0, 1)
            ax.spines[["top", "right"]].set_visible(False)
            if len(keys) > 1:
                ax.legend(fontsize=8, frameon=False, ncols=1 + (len(keys) > 3))

def draw_usage(path, usage):
    """How often each code is used (K,), most used first."""
    percent = (usage / usage.sum() * 100).sort(descending=True).values
    with figure(path, (7, 2.6)) as (ax,):
        ax.fill_between(range(len(usage)), percent, step="mid", color="#b5533c")
        ax.axhline(100 / len(usage), color="black", lw=0.8, ls=":", label="all used equally")
        ax.set(xlabel="codes, most used first", ylabel="use, %", ylim=(0, None),
               title=f"{int((usage > 0).sum())} of {len(usage)} codes used on held-out images")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)

def draw_trajectory(path, steps, make):
    """From noise to image: z_t and the guess z0_hat of three images, decoded, at eight times."""
    at = [round(i * (len(steps) - 1) / 7) for i in range(8)]
    draw_rows(path, {f"{i + 1}: {name}": make.decode(torch.stack([steps[j][part][i] for j in at]))
                     for i in range(min(3, len(steps[0][0])))
                     for part, name in enumerate(("z_t", "guess of z0"))})

def draw_nearest(path, x, images, make, perceptual):
    """Samples above their nearest training images, by latent and by LPIPS features: copies?
    The yardstick is how near held-out images come to the training set."""
    spaces = {"latent": lambda u8: make.encode(to_float(u8)).flatten(1).cpu()}
    if perceptual:
        spaces["LPIPS"] = lambda u8: perceptual.features(u8, 64)
    both, rows = torch.cat([x, images.rows(images.held[:500])]), {"sample": x[:8]}
    for name, space in spaces.items():
        mine = torch.cat([space(u8) for u8 in both.split(64)]).float()
        near, who = torch.full((len(both),), math.inf), torch.zeros(len(both), dtype=torch.long)
        for idx in images.train.split(64):
            d, j = torch.cdist(mine, space(images.rows(idx)).float()).min(1)
            near, who = torch.minimum(near, d), torch.where(d < near, idx[j], who)
        copies = int((near[:len(x)] < near[len(x):].quantile(0.01)).sum())
        say(f"{copies} of {len(x)} samples are closer to a training image, by {name}, than 99 % of "
            f"held-out images are{': look at them' * (copies > 0.05 * len(x))}")
        rows[f"nearest by {name}"] = images.rows(who[:min(8, len(x))])
    draw_rows(path, rows)

def draw_more(cfg, make, labels):
    """What else sample draws, for each class asked for {name: its number (1,)}."""
    if cfg.interpolate:         # without fresh noise, from noises on the way between two
        a, b = make.noise_of(cfg.seed, range(2))()
        # Along the sphere (slerp): the straight way would shorten them.
        angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), 0).clamp(-1, 1))
        w = angle * torch.linspace(0, 1, 8, device=make.device).view(-1, 1, 1, 1)
        z = (torch.sin(angle - w) * a + torch.sin(w) * b) / torch.sin(angle)
        still = replace(cfg, sampler=cfg.sampler.replace("ddpm", "ddim"), eta=0.0)
        draw_rows(Path(cfg.out, "interpolate.png"), {
            c: make(still, range(8), k if k is None else k.expand(8), z)[0]
            for c, k in (labels or {"between two noises": None}).items()})
    if labels:
        ws = (0, 1, 2, 3, 5, 8)
        draw_rows(Path(cfg.out, "guidance.png"), {c: torch.cat([
            make(replace(cfg, guidance=w), [0], k)[0] for w in ws])
            for c, k in labels.items()})
        say(f"guidance.png shows one noise under guidance {', '.join(map(str, ws))}")

def write_pngs(folder, images, numbers):
    for i, x in zip(numbers, images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(make_folder(folder) / f"{i:05d}.png")

def asked_classes(state, text):
    """--class, as typed -> (the names that the model knows, those that are asked for)."""
    classes = state["classes"] if state["conditional"] else []
    whole = {"all": classes, **{c: [c] for c in classes}}   # may hold a comma: "Melanoma, NOS"
    names = whole.get(text) or [c.strip() for c in text.split(",") if text]
    for c in names:
        if c not in classes:
            raise UserError(f"--class {c}: must be one of {', '.join([*classes, 'all'])}" if classes
                            else f"--class {c}: this model knows no classes; leave it out")
    return classes, names

def check_steps(typed, state):          # if it is the default that exceeds T, T is meant
    if typed.get("steps", 0) > (T := state["config"].get("T", math.inf)):
        raise UserError(f"--steps {typed['steps']}: at most T = {T} of this model")

def sample(cfg, typed):
    """Noise -> latents -> codes -> pixels, batch by batch: memory does not grow with --n."""
    state = load_checkpoint(cfg.ckpt, ["ldm"], "--ckpt")
    classes, names = asked_classes(state, cfg.class_)
    check_steps(typed, state)
    folder = Path(cfg.out)
    old = [p for p in (*folder.glob("*.png"), *folder.glob("*/*.png"))   # names that sample gives
           if p.name in SHEETS or re.fullmatch(r"\d{5,}", p.stem)]
    if old and not cfg.overwrite:
        raise UserError(f"--out {folder}: already holds pictures; --overwrite replaces them")
    make = Generator(state, *pick_device(cfg), cfg.ckpt)
    T, size, total = make.cfg.T, make.vq_cfg.size, cfg.n * max(1, len(names))
    if cfg.from_:
        given = get_images(cfg, cfg.from_, make.vq_cfg, None, "to vary", "--from")
    if cfg.nearest:
        images = get_images(cfg, make.cfg.data or make.vq_cfg.data, make.vq_cfg)
    labels = make.labels(range(total))
    if names:
        labels = torch.tensor([classes.index(c) for c in names]).repeat_interleave(cfg.n)
    for p in old:
        p.unlink()
    say(f"{total} images of {size}×{size}, {cfg.sampler}, {min(cfg.steps, T)} steps"
        + f"; classes {', '.join(names or classes)}" * bool(classes)
        + f"; guidance {cfg.guidance:g}")
    make_folder(folder)
    shown, sums = {c: [] for c in names or classes or [""]}, torch.zeros(3, dtype=torch.float64)
    for numbers in batches(total, 32, "sampling"):
        label, z, levels = None if labels is None else labels[numbers], None, T
        if cfg.from_:       # noise a real latent part of the way, then walk back from there
            levels = max(1, round(cfg.strength * T))
            z0 = make.encode(given.batch(given.all[numbers % len(given.all)]))
            t = torch.full((len(z0),), levels - 1, device=make.device)
            z = make.diffusion.add_noise(z0, t, make.noise_of(f"{cfg.seed} from", numbers)())
        x, steps = make(cfg, numbers, label, z, levels)
        for c in shown:
            mine = label == classes.index(c) if classes else numbers >= 0
            to = folder / re.sub(r"[^\w ,+-]", "_", c) if len(names) > 1 else folder
            write_pngs(to, x[mine], numbers[mine].tolist())
            shown[c].extend(x[mine][:max(0, (16 if classes else 64) - len(shown[c]))])
        if cfg.trajectory and numbers[0] == 0:
            draw_trajectory(folder / "trajectory.png", steps, make)
        z0 = steps[-1][0].cpu().double()
        sums += torch.stack([torch.tensor(z0.numel()), z0.sum(), z0.square().sum()])
    mean, square = (sums[1:] / sums[0]).tolist()
    std = (square - mean ** 2) ** 0.5
    say(f"samples' latents: mean {mean:+.2f}, std {std:.2f} (healthy: 0 and 1)")
    if (abs(mean) > 0.2 or not 0.8 < std < 1.25) and not cfg.from_ and total >= 16:    # few stray
        say("WARNING that is far off, so colours and contrast are too: lower --guidance if std is "
            "above 1, else train stage 2 for longer")
    shown = {c: torch.stack(v) for c, v in shown.items() if v}
    draw_rows(folder / "grid.png", shown)
    draw_more(cfg, make, {c: torch.tensor([classes.index(c)]) for c in names})
    if cfg.nearest:
        mixed = torch.cat([v[i::8] for i in range(8) for v in shown.values()])  # each class early
        perceptual, _ = load_perceptual("auto", make.device)
        draw_nearest(folder / "nearest.png", mixed, images, make, perceptual)
    say(f"look at {folder / 'grid.png'}")
    return 0

# ------------------------------------------------------------------------------------------------
# 14. Measuring, commands
# ------------------------------------------------------------------------------------------------
# A number means something beside its references: what do real images score against real ones, and
# what would the best possible stage 2 score with this VQGAN?

def frechet(a, b):
    """Fréchet distance of two sets of features (n,C), taken as Gaussians (Heusel et al. 2017)."""
    ca, cb = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root)

def kernel_distance(a, b):
    """Squared MMD with a cubic kernel, unbiased (Bińkowski et al. 2018)."""
    kaa, kbb, kab = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    return float((kaa.sum() - kaa.trace()) / n / (n - 1) + (kbb.sum() - kbb.trace()) / m / (m - 1)
                 - 2 * kab.mean())

def linear_classifier(f, y, n_classes, seed, ridge=3.0):
    """Ridge regression from features (n,F) to classes y (n,), each class weighing the same, on a
    resample of the images: several seeds show the spread. -> a function, features -> classes."""
    pick = torch.randint(len(f), (len(f),), generator=rng(seed, "resample"))
    f, y = f[pick], F.one_hot(y[pick], n_classes).double()
    weight = (1 / y.sum(0).clamp(min=1))[y.argmax(1), None]               # (n,1)
    mean, std = (weight * f).sum(0) / weight.sum(), f.std(0) + 1e-6
    A = (f - mean) / std                # of mean 0 over classes of equal weight: needs no constant
    shrink = ridge * torch.eye(A.shape[1]).to(A)
    W = torch.linalg.solve(A.T @ (weight * A) + shrink, A.T @ (weight * y))
    return lambda f: ((f - mean) / std @ W).argmax(1)

def use_test(make, images, test, held, perceptual, cfg):
    """Are made images of any use? Classifiers trained on real, on made and on both images, tested
    on real held-out ones (rows of test): balanced accuracy. Do they recognise the made?"""
    n_classes = len(make.classes)
    label = torch.arange(n_classes).repeat_interleave(max(20, cfg.n // n_classes))
    rows = images.train[torch.randperm(len(images.train), generator=rng(cfg.seed, "use"))[:4000]]
    # All maps at 128 pixels: on ISIC's seven classes 60 % right, with the last one at 224 only 55.
    made, real, new = (perceptual.features(x, 128, every=True) for x in (
        make.many(cfg, 10**6 + torch.arange(len(label)), label)[0], images.rows(rows),
        test.rows(held)))
    y, truth = images.labels[rows], test.labels[held]
    n = torch.bincount(y, minlength=n_classes).float()
    rare = (n < n.mean())[label]
    sets = {"real": (real, y), "made": (made, label),
            "real + made of rare": (torch.cat([real, made[rare]]), torch.cat([y, label[rare]]))}

    def recall(guess, truth):
        return torch.stack([(guess[truth == c] == c).double().mean() for c in truth.unique()]) * 100
    scores = {}
    for name, (f, y) in sets.items():
        fits = [linear_classifier(f, y, n_classes, seed) for seed in range(3)]
        scores[name] = torch.stack([recall(fit(new), truth).mean() for fit in fits])
        say(f"  classifier trained on {name:22} balanced accuracy {scores[name].mean():5.1f} % "
            f"± {scores[name].std():.1f} on real images (chance {100 / n_classes:.0f} %)")
        if name == "real":
            seen = torch.stack([recall(fit(made), label) for fit in fits]).mean(0)
    say("  of the made images it recognises: "
        + ", ".join(f"{c} {s:.0f} %" for c, s in zip(make.classes, seen)))
    a, b = scores["real"], scores["real + made of rare"]
    gain = float(b.mean() - a.mean())
    say(f"  adding made images of the rare classes changes accuracy by {gain:+.1f} points"
        + ", within the spread" * (abs(gain) <= float(a.std() + b.std())))
    return dict(use_real=float(a.mean()), use_made=float(scores["made"].mean()),
                use_both=float(b.mean()), recognised_percent=float(seen.mean()))

def evaluate_samples(make, images, test, held, perceptual, cfg):
    """Samples against held-out images, with references. -> numbers by name, reals, samples."""
    how = None, make.device, make.dtype                                   # None: without LPIPS
    _, _, x, x_hat = measure_vq(make.vqgan, test, held[:cfg.n], *how)
    n, label = len(x), make.labels(range(len(x)))
    made, z0 = make.many(cfg, torch.arange(n), label)
    m = dict(frechet=None, kernel=None, frechet_real=None, frechet_recon=None,
             latent_mean=float(z0.mean()), latent_std=float(z0.std()), n=n, frechet_perfect=None)
    same = test.classes == images.classes
    if perceptual:
        # A second set of real images: other held-out ones, else training images, which the VQGAN
        # knows. A perfect stage 2 draws new latents such as the encoder makes: it scores as copies
        # of this set do, not as copies of the held-out images, which no sampler can reach.
        some = images.train[torch.randperm(len(images.train), generator=rng("floor"))]
        other = (test, held[n:2 * n]) if len(held) >= 2 * n else (
            images, some[torch.arange(n) % len(some)])
        _, _, y, y_hat = measure_vq(make.vqgan, *other, *how)
        fx, fm, fr, *more = map(perceptual.features, (x, made, x_hat, y, y_hat))
        say(f"  in features of LPIPS-{perceptual.name}, comparable at equal n".ljust(60)
            + "Fréchet   kernel")
        for key, name, f in zip(("", "_recon", "_real", "_perfect"), (
                "samples", "reconstructions of the held-out images", "other real images: the floor",
                "reconstructions of those others: a perfect stage 2"), (fm, fr, *more)):
            m[f"frechet{key}"] = frechet(fx, f)
            say(f"  {name:58}{m[f'frechet{key}']:9.1f}{kernel_distance(fx, f):9.3f}")
        m["kernel"] = kernel_distance(fx, fm)
        for c, name in enumerate(make.classes if same else []):
            a, b = test.labels[held[:n]] == c, label == c
            if min(a.sum(), b.sum()) >= 10:
                m[f"frechet_{name}"] = frechet(fx[a], fm[b])
                say((f"    {name}: {b.sum()} made, {a.sum()} real, reconstructions "
                     f"{frechet(fx[a], fr[a]):.1f}").ljust(60) + f"{m[f'frechet_{name}']:9.1f}")
    say(f"  samples' latents: mean {m['latent_mean']:+.3f}, std {m['latent_std']:.3f} "
        "(healthy: 0 and 1)")
    if make.classes and perceptual and cfg.use_test and same:
        m.update(use_test(make, images, test, held[:2000], perceptual, cfg))
    return m, x, made

def evaluate(cfg, typed):
    """Measure a checkpoint of either stage on held-out images."""
    state = load_checkpoint(cfg.ckpt, ["ldm", "vq"], "--ckpt")
    check_steps(typed, state)
    device, dtype = pick_device(cfg)
    perceptual, _ = load_perceptual("auto", device)
    make = Generator(state, device, dtype, cfg.ckpt) if state["kind"] == "ldm" else None
    vqgan, vq_cfg = (make.vqgan, make.vq_cfg) if make else build_vqgan(state, device, cfg.ckpt)
    source = state["config"]["data"] or vq_cfg.data
    images = test = get_images(cfg, source, vq_cfg)
    if cfg.data not in ("", source):            # a folder of its own: all of it is held out
        test = get_images(cfg, cfg.data, vq_cfg, None, "to measure on")
        test.held = test.all
    held = test.held[torch.randperm(len(test.held), generator=rng(cfg.seed, "evaluate"))]
    if len(held) < 2:
        raise UserError(f"--data {cfg.data or source}: one held-out image is no set; give more")
    out = make_folder(cfg.out or (cfg.ckpt if Path(cfg.ckpt).is_dir() else Path(cfg.ckpt).parent))
    say(f"{min(cfg.n, len(held))} held-out images of {cfg.data or source}")
    if make:
        kind, (m, x, made) = "samples", evaluate_samples(make, images, test, held, perceptual, cfg)
    else:
        kind = "recon"
        m, _, x, made = measure_vq(vqgan, test, held[:cfg.n], perceptual, device, dtype)
        m = {name: m.get(name) for name in
             ("psnr", "ssim", "lpips", "codes_used_percent", "perplexity", "n")}
        for name, value in m.items():
            say(f"  {name:20}" + ("  no weights" if value is None else f"{value:9.3f}"))
    draw_rows(out / "evaluate.png", {"held out": x[:16], kind: made[:16]})
    for name, pictures in (("real", x), (kind, made)) if cfg.save_images else ():
        for old in Path(cfg.save_images, name).glob("[0-9]*.png"):      # of a run with a larger --n
            old.unlink()
        write_pngs(Path(cfg.save_images, name), pictures, range(len(pictures)))
    write_whole(out / "metrics.json", lambda f: f.write(json.dumps(m, indent=1).encode()))
    say(f"numbers in {out / 'metrics.json'}, picture in {out / 'evaluate.png'}")
    return 0

def timed(cfg, part, words):
    """One row of bench, in a process of its own, whose peak memory is then this part's alone.
    words: a training command, or a checkpoint's path (the rest is unused).
    -> (images per second, GB), what WARNINGs were said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if words[0] in COMMANDS:
            run_command(words)
            speed = load_checkpoint(words[-1], ["vq", "ldm"], "--out")["speed"]
        else:
            state = load_checkpoint(words[0], ["ldm"], "--out")
            make = Generator(state, *pick_device(cfg), words[0])
            n, size, label = 32, make.vq_cfg.size, make.labels(range(32))
            x, z0 = torch.rand(n, 3, size, size), make.noise_of(0, range(n))()
            work = dict(draw=lambda: [synthetic(16, size, 0, i) for i in range(0, n, 16)],
                        encode=lambda: make.encode(x).cpu(), decode=lambda: make.decode(z0),
                        sample=lambda: make.many(Sampling(), torch.arange(n), label))[part]
            work()                                  # the first time is slower
            began, done = time.monotonic(), 0
            while not done or time.monotonic() - began < cfg.minutes * 60:
                work()
                done += n
            speed = done / (time.monotonic() - began), memory_gb(make.device)
    return speed, [line for line in said.getvalue().splitlines() if line.startswith("WARNING")]

def bench(cfg, typed):
    """Images/s and peak memory of each part of a run on this machine, and how long it will take."""
    try:
        vq, ldm = ([f"train-{stage}", "--preset", cfg.preset, *shlex.split(flags)]
                   for stage, flags in (("vq", cfg.vq_flags), ("ldm", cfg.ldm_flags)))
    except ValueError as e:
        raise UserError(f"--vq-flags, --ldm-flags: {e}") from None
    c, d = (settings(*parse_command(words)[1:]) for words in (vq, ldm))
    folder, result, told = make_folder(cfg.out), {}, set()
    base = ["--overwrite", "--device", cfg.device, "--seed", str(cfg.seed), "--cache", cfg.cache,
            "--epochs", "1000000", "--minutes", str(cfg.minutes), *["--allow-bad"] * cfg.allow_bad]
    vq += [*base, "--n-images", "512"]
    parts = {"VQGAN": [*vq, "--gan-weight", "0"], "VQGAN with GAN": [*vq, "--gan-start", "0"],
             "UNet": [*ldm, *base, "--vq", f"{folder}/VQGAN-{cfg.precision}"],
             **{name: [f"{folder}/UNet-{cfg.precision}"] for name in (
                 "draw", "encode", "decode", "sample")}}
    pick_device(cfg)
    say(f"preset {c.preset}: {c.size}×{c.size}, batches of {c.batch_size} and {d.batch_size}\n"
        f"  {'':18}{cfg.precision:>14}{'fp32':>14}{'ratio':>11}{'peak memory':>13}")
    for part, words in parts.items():
        for precision in (cfg.precision, "fp32"):
            argv = [*words, "--precision", precision, "--out", f"{folder}/{part}-{precision}"]
            with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as alone:
                result[f"{part}, {precision}"], warned = alone.submit(
                    timed, replace(cfg, precision=precision), part, argv).result()
            for line in dict.fromkeys(line for line in warned if line not in told):
                told.add(line)
                say(line)
        a, b = (result[f"{part}, {precision}"] for precision in (cfg.precision, "fp32"))
        say(f"  {part:18}{a[0]:8.1f} img/s{b[0]:8.1f} img/s{a[0] / b[0]:10.2f}x{a[1]:10.2f} GB")
    n, late = c.n_images * (1 - c.held_out), max(0, c.epochs - c.gan_start) * bool(c.gan_weight)
    if c.data != "synthetic":
        n = sum(load_checkpoint(parts["draw"][0], ["ldm"], "--out")["class_counts"])
    # Minutes for n images. Those that are held out are drawn and encoded too.
    early, gan, unet, draw, encode, *_ = (
        n / result[f"{part}, {cfg.precision}"][0] / 60 for part in parts)
    every = 1 / (1 - c.held_out)
    say(f"this run on {n:.0f} training images: about "
        + f"{draw * every:.1f} min of drawing, " * (c.data == "synthetic")
        + f"{early * (c.epochs - late) + gan * late:.1f} of stage 1, "
        f"{encode * every * d.views + unet * d.epochs:.1f} of stage 2")
    write_whole(folder / "bench.json", lambda f: f.write(json.dumps(result, indent=1).encode()))
    return 0

def demo(cfg, typed):
    """The three commands in a row, as a user would type them."""
    began = time.monotonic()
    extra = [word for k, v in typed.items() if k not in ("data", "out", "preset") and v is not False
             for word in ([flag(k)] if v is True else [flag(k), str(v)])]
    vq, ldm, out = (str(Path(cfg.out, k)) for k in ("vq", "ldm", "samples"))
    for words in (["train-vq", "--data", cfg.data, "--preset", cfg.preset, "--out", vq],
                  ["train-ldm", "--vq", vq, "--preset", cfg.preset, "--out", ldm],
                  ["sample", "--ckpt", ldm, "--out", out, "--nearest"]):
        say(f"\n$ python vqldm.py {shlex.join(words + extra)}")
        if code := run_command(words + extra):
            return code
    say(f"done in {(time.monotonic() - began) / 60:.1f} minutes; pictures in {vq}, {ldm}, {out}")
    return 0

def run_command(argv):
    command, cls, typed = parse_command(argv)
    if world() > 1 and not issubclass(cls, Training):
        raise UserError(f"{command}: runs in one process; torchrun is for train-vq and train-ldm")
    functions = dict(zip(COMMANDS, (train_vq, train_ldm, sample, demo, evaluate, bench)))
    return functions[command](settings(cls, typed), typed)

def main(argv=None):
    """Run one command. SystemExit 2 after a user's mistake, 130 / 143 after Ctrl-C / SIGTERM."""
    text, code = None, 2
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                    timeout=timedelta(days=1))      # others wait for preparations
        code = run_command(sys.argv[1:] if argv is None else argv)
        if world() > 1:         # leave together: who goes early cuts off what the others still read
            dist.barrier()
            dist.destroy_process_group()
            sys.stdout.flush()
            # trap: a thread of gloo may hold a tensor a moment longer than Python lives, and then
            # the end of a finished run is "terminate called" (pytorch pull request 179291).
            os._exit(code)
    except UserError as e:
        text = e
    except KeyboardInterrupt:
        text, code = "interrupted; checkpoints are whole", 130
    except (MemoryError, RuntimeError, OSError) as e:
        if isinstance(e.__context__, OSError):      # torch.save hides a full disk behind its own
            e = e.__context__
        if isinstance(e, MemoryError) or re.search(
                "out of memory|not enough memory|alloc|terminated abruptly", str(e)):
            text = "out of memory; a smaller --batch-size or --size helps. Checkpoints are whole"
        elif isinstance(e, OSError) and e.errno:
            text = f"{e.filename or 'writing'}: {e.strerror}. Free some space, or use another " \
                "folder; checkpoints are whole"
        elif world() > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            text = "another process of this run has ended; checkpoints are whole, --resume goes on"
        else:
            raise
    if text is not None and rank() == 0:
        print(f"vqldm: {text}", file=sys.stderr)
    if code:
        raise SystemExit(code)
    return 0

if __name__ == "__main__":
    main()
