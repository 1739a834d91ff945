#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
r"""vqldm: VQGAN + latent diffusion in one file, from pixels to new images.

Stage 1 (the VQGAN) learns to squeeze an image into a small grid of code words and back. Stage 2
(latent diffusion) learns to make new grids out of noise, which the VQGAN's decoder turns into
images. The second stage works on few numbers, and that is why this fits on a laptop.

  x ────E────► z ───nearest code───► z_q ────D────► x_hat      stage 1: VQGAN       (train-vq)
  (B,3,H,W)   (B,d,h,w)   │         (B,d,h,w)      (B,3,H,W)
                          └► k (B,h,w) in 0…K-1         h = H/f, w = W/f, f = 2^m
  z0 = (z-mean)/std ──noise──► z_t ──UNet(z_t,t)──► eps_hat    stage 2: diffusion   (train-ldm)
  image ◄──D── z_q ◄─nearest─ z ◄─·std+mean─ z0 ◄─T-1…0─ noise sampling             (sample)

Letters   B batch · H W pixels · h w latent grid · d length of a code · K codes · N = h·w tokens
          C channels · T diffusion steps · S sampling steps · E length of the time embedding
          x image in [-1,1] · x_hat its reconstruction · z latent · z_q its code · k its number
          z0 standardised latent (DDPM's x_0) · z_t the same at noise level t in 0…T-1
          eps the noise, eps_hat its estimate · lam the adaptive weight λ · D the discriminator

Equations (each stands in the code as its bare number; "VQ" is van den Oord et al. 2017, arXiv
          1711.00937; "VQGAN" Esser et al. 2021, 2012.09841; "DDPM" Ho et al. 2020, 2006.11239;
          "DDIM" Song et al. 2021, 2010.02502; "v" Salimans & Ho 2022, 2202.00512; "CFG" Ho &
          Salimans 2022, 2207.12598; "LDM" Rombach et al. 2022, 2112.10752)
  (1)  k = argmin_j ‖z - e_j‖,  z_q = e_k                                      VQ eq. 1-2
  (2)  value of z_q, gradient of z: straight through                           VQ sec. 3.2
  (3)  codebook ‖sg[z] - z_q‖²   (4)  commitment ‖sg[z_q] - z‖²                VQ eq. 3
  (5)  L_VQ = ‖x - x_hat‖² + LPIPS(x, x_hat) + (3) + (4),  min max L_VQ + lam L_GAN   VQGAN eq. 4-6
  (6)  lam = ‖∇_L L_rec‖ / (‖∇_L L_GAN‖ + δ), L the decoder's last layer       VQGAN eq. 7
  (7)  hinge: D minimises relu(1 - D(x)) + relu(1 + D(x_hat)), G minimises -D(x_hat)
  (8)  alpha_t = 1 - beta_t,  alpha_bar_t = alpha_0 · … · alpha_t              DDPM sec. 2
  (9)  z_t = √alpha_bar_t z0 + √(1 - alpha_bar_t) eps                          DDPM eq. 4
  (10) ‖eps - eps_hat(z_t, t)‖², t uniform: Algorithm 1                        DDPM eq. 14, LDM eq. 2
  (11) z_{t-1} = (z_t - (1-alpha_t)/√(1-alpha_bar_t) eps_hat)/√alpha_t + sigma_t n: Algorithm 2
  (12) v = √alpha_bar eps - √(1-alpha_bar) z0, so z0 = √alpha_bar z_t - √(1-alpha_bar) v   v app. D
  (13) z_prev = √alpha_bar_prev z0_hat + √(1 - alpha_bar_prev - sigma²) eps_hat + sigma n  DDIM eq. 12
  (14) out = out(no class) + w (out(class) - out(no class))                    CFG eq. 6, w = theirs + 1

Contents
@@CONTENTS@@
Run it    python vqldm.py train-vq      then      train-ldm      then      sample
          python vqldm.py demo          does the three in a row: @@DEMO@@ on two laptop cores
          grep -n trap: vqldm.py        what everybody gets wrong, at the line where it happens
"""
import argparse
import difflib
import math
import os
import sys
import typing
from dataclasses import asdict, dataclass, field, fields

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------
# Every number that you can change is one line here: name, type, default, its sentence of help and
# what is allowed. The command line, --help, the checks and the checkpoint are made from these
# lines, so they cannot disagree. Which value wins: default < --preset < recorded in the checkpoint
# (on --resume) < typed. This section runs before torch is imported (0.1 s instead of 2 s), so
# --help and typing mistakes are answered at once.


def opt(default, help, lo=None, hi=None, choices=None, free=False):
    """One setting. lo, hi: the smallest and largest value allowed. free: may change on --resume."""
    return field(default=default, metadata=dict(help=help, lo=lo, hi=hi, choices=choices, free=free))


class UserError(Exception):
    """Something only the user can put right: printed as one sentence, exit status 2."""


@dataclass(frozen=True)
class Machine:
    """Settings of every command: where it runs, what it may touch."""
    seed: int = opt(0, "random seed; all randomness is a function of it", 0, 2**31 - 1)
    device: str = opt("auto", "auto (cuda, else mps, else cpu), or a torch device such as cuda:1", free=True)
    precision: str = opt("auto", "number format of the big matrix products; auto: bf16 where it is faster",
                         choices=("auto", "fp32", "bf16"), free=True)
    cache: str = opt("runs/cache", "folder for decoded images and latents; may be deleted", free=True)
    allow_bad: bool = opt(False, "go on even if more than 20 % of the images cannot be read", free=True)
    overwrite: bool = opt(False, "replace what is already in the --out folder", free=True)


@dataclass(frozen=True)
class Training(Machine):
    """Settings that both training commands share."""
    preset: str = opt("default", "a set of settings: default (laptop), tiny (seconds, to try out), report "
                      "(256x256 as in the reference report, for a GPU)", choices=("default", "tiny", "report"))
    resume: bool = opt(False, "go on with the run in --out where it was stopped", free=True)
    minutes: float = opt(0.0, "stop after this many minutes, saved and resumable; 0: train all epochs",
                         0, 1e6, free=True)
    warmup: int = opt(50, "steps over which the learning rate rises from 0", 0, 10**6)
    decay: float = opt(0.5, "last part of the run in which the learning rate falls to 0, as a fraction", 0, 1)
    clip: float = opt(1.0, "largest norm of the gradient; longer ones are scaled down", 1e-6, 1e9)
    compile: bool = opt(False, "torch.compile the networks: minutes to start, faster on GPUs", free=True)


@dataclass(frozen=True)
class VQConfig(Training):
    """Stage 1: what train-vq does."""
    data: str = opt("synthetic", "'synthetic' or a folder of images, searched recursively; class = folder")
    out: str = opt("runs/vq", "folder for the checkpoint, the log and the pictures", free=True)
    size: int = opt(64, "side of the square images, in pixels", 8, 4096)
    n_images: int = opt(4096, "number of images to draw when the data is synthetic", 2, 10**9)
    held_out: float = opt(0.1, "fraction of the images kept for measuring, never trained on", 0.001, 0.9)
    widths: tuple[int, ...] = opt((32, 64), "channels of each DownBlock; f = 2^(their number)", 1, 4096)
    heads: int = opt(4, "attention heads; must divide the last width", 1, 256)
    z_dim: int = opt(4, "d, the length of a code", 1, 1024)
    codes: int = opt(512, "K, the number of codes", 2, 2**20)
    codebook_weight: float = opt(1.0, "weight of the codebook loss (3)", 0, 1e4)
    commit_weight: float = opt(0.25, "weight of the commitment loss (4)", 0, 1e4)
    revive_every: int = opt(50, "steps between revivals of unused codes", 1, 10**6)
    perceptual_weight: float = opt(1.0, "weight of LPIPS", 0, 1e4)
    lpips: str = opt("auto", "network inside LPIPS; auto: squeeze if its weights can be had, else off",
                     choices=("auto", "off", "squeeze", "alex", "vgg"))
    gan_weight: float = opt(0.5, "weight of the generator's adversarial loss, beside lam; 0: no GAN", 0, 1e4)
    gan_start: float = opt(8.0, "epochs before the generator's adversarial loss starts", 0, 1e6)
    gan_ramp: float = opt(1.0, "epochs over which that loss rises to its full weight", 0, 1e6)
    d_warmup: float = opt(0.5, "epochs that the discriminator trains alone before gan_start", 0, 1e6)
    d_widths: tuple[int, ...] = opt((32, 64, 128), "channels of the patch discriminator's layers", 1, 4096)
    d_lr: float = opt(4e-4, "learning rate of the discriminator", 1e-9, 1)
    lr: float = opt(1e-3, "learning rate, absolute: never scaled by batch size or processes", 1e-9, 1)
    batch_size: int = opt(16, "images in a step, over all processes", 1, 2**20)
    epochs: int = opt(12, "passes over the training images", 1, 10**6, free=True)

    @property
    def f(self):
        """f = H/h = 2^m, derived: numbers that must agree are one number."""
        return 2 ** len(self.widths)

    def check(self):
        if self.size % self.f:
            raise UserError(f"--size {self.size}: must be a multiple of f = {self.f} (2 to the number of --widths)")
        if self.widths[-1] % self.heads:
            raise UserError(f"--heads {self.heads}: must divide the last of --widths, {self.widths[-1]}")
        latents = (self.size // self.f) ** 2 * self.batch_size
        if self.size // 2 ** len(self.d_widths) < 2:
            raise UserError(f"--d-widths {' '.join(map(str, self.d_widths))}: {len(self.d_widths)} layers that "
                            f"halve the image are too many for --size {self.size}")
        if latents < 2:
            raise UserError(f"--batch-size {self.batch_size}: one latent in a step cannot teach a codebook; use 2")


@dataclass(frozen=True)
class LDMConfig(Training):
    """Stage 2: what train-ldm does."""
    vq: str = opt("runs/vq", "run folder or checkpoint of train-vq")
    data: str = opt("", "'synthetic' or a folder of images; empty: what the VQGAN was trained on")
    out: str = opt("runs/ldm", "folder for the checkpoint, the log and the pictures", free=True)
    views: int = opt(1, "symmetries of each image (of the 8 of the square) whose latents are cached", 1, 8)
    T: int = opt(1000, "diffusion steps", 10, 10**5)
    schedule: str = opt("linear", "how the noise grows with t", choices=("linear", "cosine"))
    target: str = opt("v", "what the network learns to predict: v (12) or eps, the noise itself (10)",
                      choices=("v", "eps"))
    unet_widths: tuple[int, ...] = opt((64, 128), "channels of each DownBlock of the UNet", 1, 4096)
    heads: int = opt(4, "attention heads; must divide the last of --unet-widths", 1, 256)
    class_cond: bool = opt(True, "tell the network the class (ignored if there is only one)")
    label_drop: float = opt(0.1, "fraction of the labels hidden in training, for guidance", 0, 1)
    balance: bool = opt(False, "draw each class equally often, however rare it is")
    ema: float = opt(0.999, "decay of the running mean of the weights, which is what samples", 0, 1)
    lr: float = opt(1e-3, "learning rate, absolute: never scaled by batch size or processes", 1e-9, 1)
    batch_size: int = opt(64, "latents in a step, over all processes", 1, 2**20)
    epochs: int = opt(60, "passes over the training latents", 1, 10**6, free=True)

    def check(self):
        if self.unet_widths[-1] % self.heads:
            raise UserError(f"--heads {self.heads}: must divide the last of --unet-widths, {self.unet_widths[-1]}")


@dataclass(frozen=True)
class SampleConfig(Machine):
    """What sample does."""
    ckpt: str = opt("runs/ldm", "run folder or checkpoint of train-ldm")
    out: str = opt("runs/samples", "folder for the pictures")
    n: int = opt(64, "number of images; with --class, of each class", 1, 10**7)
    steps: int = opt(50, "S, steps from noise to image, at most T", 1, 10**5)
    sampler: str = opt("ddim", "ddim (13), or ddpm (11), which wants more steps", choices=("ddim", "ddpm"))
    eta: float = opt(1.0, "fresh noise in a ddim step: 0 none, 1 as much as in DDPM", 0, 1)
    class_: str = opt("", "only this class; several by comma; 'all': each into a folder of its own")
    guidance: float = opt(1.0, "w of (14): 0 ignores the class, 1 plain conditional, more exaggerates it", 0, 100)
    nearest: bool = opt(False, "also draw nearest.png: samples beside their nearest training images")
    trajectory: bool = opt(True, "also draw trajectory.png: from noise to image")

    def check(self):
        pass


@dataclass(frozen=True)
class EvaluateConfig(Machine):
    """What evaluate does."""
    ckpt: str = opt("runs/ldm", "run folder or checkpoint of either stage")
    data: str = opt("", "folder of held-out images, all of them used; empty: the part held out in training")
    out: str = opt("", "folder for metrics.json and the picture; empty: the checkpoint's own folder")
    n: int = opt(500, "number of held-out images, and of samples", 2, 10**7)
    steps: int = opt(50, "S, sampling steps", 1, 10**5)
    save_images: str = opt("", "also write real/ and recon/ or samples/ as PNGs into this folder")

    def check(self):
        pass


@dataclass(frozen=True)
class DemoConfig(Machine):
    """What demo does."""
    data: str = opt("synthetic", "'synthetic' or a folder of images")
    out: str = opt("runs", "folder that gets vq/, ldm/ and samples/")
    preset: str = opt("default", "as in train-vq", choices=("default", "tiny", "report"))

    def check(self):
        pass


PRESETS = {  # by preset, then by command; "report" is the reference report's recipe
    "tiny": {
        VQConfig: dict(size=32, n_images=192, widths=(16, 32), codes=64, batch_size=8, epochs=2, gan_start=1.0,
                       gan_ramp=0.5, d_widths=(16, 32), warmup=5, revive_every=5),
        LDMConfig: dict(unet_widths=(32, 64), batch_size=16, epochs=4, warmup=5, T=200)},
    "report": {
        VQConfig: dict(size=256, n_images=20_000, widths=(128, 128, 256, 256), z_dim=256, codes=1024,
                       commit_weight=1.0, gan_weight=1.0, gan_start=8.0, d_widths=(64, 128, 256), lr=1e-4, d_lr=1e-4,
                       batch_size=8, epochs=40, decay=0.0),
        LDMConfig: dict(target="eps", unet_widths=(256, 512), class_cond=False, lr=1e-4, batch_size=32, epochs=200,
                        ema=0.9999, decay=0.0, views=8)}}


# The commands: name, settings, and the line that --help shows.
COMMANDS = {
    "train-vq": (VQConfig, "stage 1: train the VQGAN, image -> codes -> image"),
    "train-ldm": (LDMConfig, "stage 2: train the diffusion model on the VQGAN's latents"),
    "sample": (SampleConfig, "make new images with a trained stage 2"),
    "demo": (DemoConfig, "the three above in a row; with the defaults a matter of minutes"),
    "evaluate": (EvaluateConfig, "measure a checkpoint of either stage on held-out images")}


def flag(name):
    return "--" + name.rstrip("_").replace("_", "-")


def check_value(fd, kind, value):
    """The value of one setting, from text or from a checkpoint; raises UserError naming flag, value
    and what is allowed."""
    m = fd.metadata
    one = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    if m["choices"] and value not in m["choices"]:
        raise UserError(f"{flag(fd.name)} {shown}: must be one of {', '.join(m['choices'])}")
    if one is str or one is bool:
        if not isinstance(value, one) or one is str and "\0" in value:
            raise UserError(f"{flag(fd.name)} {shown!r}: must be {'text' if one is str else 'true or false'}")
        return value
    try:
        values = [one(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        if not values or not all(m["lo"] <= v <= m["hi"] for v in values):     # refuses nan and inf too
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        noun = "a whole number" if one is int else "a number"
        raise UserError(f"{flag(fd.name)} {shown}: must be {noun} from {m['lo']:,} to {m['hi']:,}") from None
    return tuple(values) if one is not kind else values[0]


def check_values(cls, values):
    """Check a dict of settings of a class; unknown names are a KeyError."""
    hints, fds = typing.get_type_hints(cls), {fd.name: fd for fd in fields(cls)}
    return {k: check_value(fds[k], hints[k], v) for k, v in values.items()}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence and nothing else."""

    def error(self, message):
        raise UserError(message)


def build_parser():
    top = Parser(prog="vqldm.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                 description="VQGAN + latent diffusion in one file. With no arguments the three commands\n"
                             "train-vq, train-ldm, sample work in a row on images that the program draws itself.",
                 epilog="python vqldm.py COMMAND --help lists its settings. Your own images: --data FOLDER.\n"
                        "Many GPUs: torchrun --nproc-per-node N vqldm.py train-vq ...")
    sub = top.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, (cls, line) in COMMANDS.items():
        p = sub.add_parser(name, help=line, description=line, allow_abbrev=False)
        hints = typing.get_type_hints(cls)
        for fd in fields(cls):
            m, kind = fd.metadata, hints[fd.name]
            shown = " ".join(map(str, fd.default)) if isinstance(fd.default, tuple) else fd.default
            text = f"{m['help']} (default: {shown})".replace("%", "%%")
            # trap: a default here would overwrite what a checkpoint recorded; SUPPRESS keeps only
            # what was typed, so that "typed" is knowable.
            kw = dict(help=text, default=argparse.SUPPRESS)
            if kind is bool:
                kw["action"] = argparse.BooleanOptionalAction
            else:
                kw["metavar"] = "|".join(m["choices"]) if m["choices"] else \
                    {int: "N", float: "X", str: "TEXT"}.get(kind, "N")
                if typing.get_origin(kind) is tuple:
                    kw["nargs"] = "+"
            p.add_argument(flag(fd.name), dest=fd.name, **kw)
    return top


def parse_command(argv):
    """argv -> (command, its settings class, the typed settings). Raises UserError."""
    args, unknown = build_parser().parse_known_args(argv)
    cls = COMMANDS[args.command][0]
    if unknown:
        known = [flag(fd.name) for fd in fields(cls)]
        close = difflib.get_close_matches(unknown[0], known, 1)
        raise UserError(f"{unknown[0]}: {args.command} has no such flag"
                        + (f"; did you mean {close[0]}?" if close else f"; python vqldm.py {args.command} --help lists them"))
    typed = {k: v for k, v in vars(args).items() if k != "command"}
    return args.command, cls, check_values(cls, typed)


def settings(cls, typed, recorded=None):
    """Default < preset < recorded in the checkpoint < typed. A differing recorded value is an error."""
    preset = PRESETS.get(typed.get("preset", "default"), {}).get(cls, {})
    base = {**preset, **(recorded or {}), **typed}
    cfg = cls(**base)
    if recorded is not None:
        fixed = [fd.name for fd in fields(cls) if not fd.metadata["free"]]
        differ = [f"{flag(k)} was {recorded[k]}, now {getattr(cfg, k)}" for k in fixed
                  if k in recorded and recorded[k] != getattr(cfg, k)]
        if differ:
            raise UserError("--resume goes on with the recorded settings, but " + "; ".join(differ)
                            + ". Leave these flags out, or start anew with another --out.")
    cfg.check()
    return cfg


if __name__ == "__main__":      # mistakes and --help end here, before the seconds that torch takes
    try:
        _command, _cls, _typed = parse_command(sys.argv[1:])
        settings(_cls, _typed)
    except UserError as e:
        sys.exit(print(f"vqldm: {e}", file=sys.stderr) or 2)

# The libraries come after section 1 on purpose: see there.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")   # trap: read once, when torch is imported
import contextlib
import copy
import csv
import hashlib
import json
import signal
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 2. Machine: device, precision, processes, randomness
# ------------------------------------------------------------------------------------------------
# Four questions that every line of training depends on, answered once: on what do we compute, in
# which number format, how many of us are there, and where do random numbers come from.


def has_bf16(device):
    """(bf16 is fast here, why). On a CPU without matrix units for bf16 it is emulated and slower."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"CUDA capability {major}.{minor}"
    if device.type == "cpu":
        for name, unit in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
            if getattr(torch.cpu, name, lambda: False)():
                return True, f"this CPU has {unit}"
        return False, "this CPU has no bf16 units"
    return False, f"{device.type} is not measured"


def pick_device(cfg):
    """-> (device, autocast dtype or None, a sentence that says which and why)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = cfg.device
    if name == "auto":
        name = f"cuda:{local}" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception:
        raise UserError(f"--device {cfg.device}: not on this machine; auto finds one, cpu always works") from None
    fast, why = has_bf16(device)
    use = fast if cfg.precision == "auto" else cfg.precision == "bf16"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True       # sizes never change: pick the fastest kernels once
    return device, torch.bfloat16 if use else None, \
        f"device {device}, {'bf16' if use else 'fp32'} ({why}), {torch.get_num_threads()} threads"


def autocast(device, dtype):
    """Matrix products in bf16, the rest as PyTorch thinks safe; nothing at all for dtype None."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def rng(*key):
    """The random numbers that belong to a key such as (seed, "noise", step).

    Randomness is looked up, never carried along: step 700 draws the same numbers whether the run
    got there at once, was killed and resumed, or drew a preview in between. So there is no random
    state to save. Drawn on the CPU: the same on every device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


# Many processes (torchrun): each computes the gradient of its share of the global batch, and the
# mean over the processes is the gradient of the whole. All draw the same random numbers for the
# whole batch and cut out their share, so N processes do what one would do.
def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return int(os.environ.get("RANK", 0))


def share(batch):
    """This process's part of something that has one entry per image of the global batch."""
    n = len(batch) // world()
    return batch[rank() * n:(rank() + 1) * n]


def sum_over_processes(t):
    if world() > 1:
        dist.all_reduce(t)
    return t


def average_gradients(params):
    """What DistributedDataParallel does, in the open: one all-reduce over all gradients in a row."""
    if world() == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = sum_over_processes(torch.cat([g.reshape(-1) for g in grads])) / world()
    for g, new in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(new.view_as(g))


def first_then_others(make):
    """rank 0 makes it (a file), then the others read what it made."""
    made = make() if rank() == 0 else None
    if world() > 1:
        dist.barrier()
    return made if rank() == 0 else make()


def say(text=""):
    if rank() == 0:
        tqdm.write(text)


# ------------------------------------------------------------------------------------------------
# 3. Data: lesions that are nobody's
# ------------------------------------------------------------------------------------------------
# To run tonight without a download, the program draws its own images: dermoscopy-like lesions in
# four classes, each made by a rule that you can read here and check in the samples later. Image i
# is a function of (seed, i) only: one row of random numbers (its "tape"), then arithmetic on all
# pixels of some images at once. Nothing here is needed to understand the models.

SYNTHETIC_CLASSES = ("keratosis-like", "melanoma-like", "nevus-like", "vascular-like")
SKIN = torch.tensor([[.93, .74, .66], [.90, .62, .60], [.80, .68, .70], [.91, .76, .58], [.84, .60, .64]])
LESION_COLOURS = torch.tensor([                                           # (class, 4 colours, RGB)
    [[.72, .60, .44], [.60, .48, .34], [.80, .72, .58], [.55, .47, .40]],    # pale: tan, cream, grey
    [[.26, .15, .11], [.45, .29, .20], [.33, .36, .47], [.55, .27, .27]],    # black, brown, blue, red
    [[.52, .31, .22], [.62, .40, .28], [.38, .22, .16], [.68, .42, .34]],    # browns
    [[.66, .12, .18], [.52, .08, .20], [.76, .24, .26], [.40, .12, .28]]])   # reds and purple


def hair_distance(xy, ends, bend):
    """Distance of each pixel to n quadratic Bezier curves, squared. (R,n,2)×3 -> (R,n,H,W)."""
    s = torch.linspace(0, 1, 13).view(1, 1, 13, 1)
    a, c = (e[:, :, None] for e in ends)
    curve = (1 - s) ** 2 * a + 2 * s * (1 - s) * bend[:, :, None] + s ** 2 * c     # (R,n,13,2)
    best = torch.full((*curve.shape[:2], *xy.shape[1:]), 9.0)
    for i in range(12):
        p, q = curve[:, :, i, :, None, None], curve[:, :, i + 1, :, None, None]
        along = ((xy - p) * (q - p)).sum(2, keepdim=True) / (q - p).square().sum(2, keepdim=True)
        best = torch.minimum(best, (xy - p - along.clamp(0, 1) * (q - p)).square().sum(2))
    return best


def synthetic(n, size, seed, start=0):
    """Draw images number start … start+n-1 of the endless set `seed`.

    Returns uint8 (n, 3, size, size) and int64 labels (n,), which index SYNTHETIC_CLASSES."""
    tapes = torch.stack([torch.rand(2600, generator=rng(seed, "lesion", i)) for i in range(start, start + n)])
    used = 0

    def take(*shape):                               # the next numbers of each tape, uniform in 0…1
        nonlocal used
        used += math.prod(shape)
        return tapes[:, used - math.prod(shape):used].view(n, *shape)

    def span(lo, hi, *shape):
        return lo + (hi - lo) * take(*(shape or (1, 1, 1)))

    def noise(cells, channels=1):                   # smooth, in about -1…1; more cells, finer grain
        return F.interpolate(take(channels, cells, cells) * 2 - 1, (size, size), mode="bicubic",
                             align_corners=True)

    def paint(image, colour, alpha):
        return image + (colour - image) * alpha

    def rgb(*c):
        return torch.tensor(c).view(3, 1, 1)

    label = torch.arange(start, start + n) % 4
    pale, melanoma, nevus, red = ((label == c).float().view(n, 1, 1, 1) for c in range(4))
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))                    # (2,H,W) in -1…1
    pixel = 2 / size

    # Skin: a mixture of five tones, with cloudy variation and a fine grain.
    mix = take(5) ** 2
    image = (mix / mix.sum(1, keepdim=True) @ SKIN).view(n, 3, 1, 1) * span(.86, 1.06)
    image = image + .035 * noise(4, 3) + .025 * noise(9) + .018 * noise(24) * rgb(.5, 1, 1)

    # Border: an ellipse whose radius swings with the angle; melanomas swing and warp the most.
    centre = span(-.16, .16, 2, 1, 1)
    d = xy - centre + .09 * noise(5, 2) * (.35 + melanoma) + .03 * noise(12, 2) * (.5 + melanoma)
    turn, stretch = span(0, math.pi, 1, 1), span(1, 1.3, 1, 1)
    dx = d[:, 0] * turn.cos() + d[:, 1] * turn.sin()
    dy = d[:, 1] * turn.cos() - d[:, 0] * turn.sin()
    k = torch.arange(2, 9).view(7, 1, 1)
    swing = span(-1, 1, 7, 1, 1) / k.sqrt() * torch.cos(k * torch.atan2(dy, dx)[:, None] + span(0, 6.3, 7, 1, 1))
    radius = span(.30, .58, 1, 1) * (1 - .3 * red[:, 0])
    wide = 1 + (.05 + .20 * melanoma + .04 * pale)[:, 0] * swing.sum(1)
    inside = (wide - (dx * dx / stretch + dy * dy * stretch).sqrt() / radius)[:, None]  # 1 centre, 0 border
    soft = span(.06, .24) * (nevus + .7 * melanoma) + .05 * (pale + red)
    lesion = torch.sigmoid(inside / soft * 2.2)

    # Colours: four of the class, each around a spot of its own; apart in melanomas, else blended.
    spots = centre.view(n, 1, 2) + span(-.9, .9, 4, 2) * radius
    colours = LESION_COLOURS[label] + span(-.04, .04, 4, 3) + span(-.04, .04, 1, 3) + span(-.06, .06, 1, 1)
    far = (xy - spots[..., None, None]).square().sum(2).sqrt()                     # (n,4,H,W)
    part = torch.softmax(-far * (3 + 9 * melanoma) + 1.3 * noise(6, 4) * (1 + melanoma), 1)
    body = torch.einsum("nphw,npc->nchw", part, colours)
    body = body * (1 - span(-.1, .5) * inside.clamp(0, 1) * (nevus + .3 * melanoma)) + .05 * noise(16)

    # Network: the walls between random cells; brown in nevi, pale between blood lakes in red ones.
    warp = .12 * noise(10, 2)
    cells = span(-.8, .8, 40, 2)
    near = (warp[:, None] + xy - cells[..., None, None]).square().sum(2).topk(2, 1, largest=False).values.sqrt()
    wall = torch.exp(-((near[:, 1:] - near[:, :1]) / (1.2 * pixel + .03)).square())
    wall = wall * torch.sigmoid(noise(5) * 5 + .5)
    body = body * (1 - wall * (span(.1, .45) * nevus + span(.1, .3) * melanoma))
    body = body * (1 - red * (.30 - .9 * near[:, :1]).clamp(0, .4))
    body = paint(body, (colours.mean(1) * .6 + torch.tensor([.40, .30, .32])).view(n, 3, 1, 1), .45 * wall * red)
    image = paint(image, body, lesion * span(.8, 1))

    # Globules: dark dots, and in keratoses pale cysts too.
    dots = centre.view(n, 1, 2) + span(-1, 1, 14, 2) * radius
    there = (take(14, 1, 1) < .25 * nevus + .45 * melanoma + .55 * pale).float() * lesion
    away = (warp[:, None] * .5 + xy - dots[..., None, None]).square().sum(2).sqrt()
    dot = torch.sigmoid((span(.012, .07, 14, 1, 1) - away) / (.7 * pixel)) * there
    image = paint(image, image * .42, .85 * dot[:, :9].amax(1, keepdim=True))
    image = paint(image, rgb(.93, .89, .80), .9 * dot[:, 9:].amax(1, keepdim=True) * pale)

    # Hairs on three of ten images: up to eight curves from outside the picture.
    count = (take(1, 1, 1) < .3) * span(1, 9)
    angle = span(0, 2 * math.pi, 8, 1)
    other = angle + span(.55, 1.45, 8, 1) * math.pi
    a = 1.25 * torch.cat([angle.cos(), angle.sin()], 2)
    c = 1.25 * torch.cat([other.cos(), other.sin()], 2) * span(-.1, 1, 8, 1)
    bend, thick, dark = (a + c) / 2 + span(-.35, .35, 8, 2), span(.006, .014), span(.55, .85)
    hairy = (count.flatten() > 0).nonzero().flatten()
    if len(hairy):
        far = hair_distance(xy, (a[hairy], c[hairy]), bend[hairy]).sqrt()
        hair = torch.sigmoid((thick[hairy] - far) / (.45 * pixel)) * (torch.arange(8).view(8, 1, 1) < count[hairy])
        image[hairy] = paint(image[hairy], rgb(.20, .13, .10), dark[hairy] * hair.amax(1, keepdim=True))

    # Light from one side, darker corners, and on some the dark round edge of the dermatoscope.
    side = span(0, 2 * math.pi)
    image = image * (1 + span(0, .12) * (xy[0] * side.cos() + xy[1] * side.sin()))
    off = (xy - span(-.06, .06, 2, 1, 1)).square().sum(1, keepdim=True).sqrt()
    image = image * (1 - .13 * off * off)
    rim = .04 + .96 * torch.sigmoid((span(.93, 1.08) - off) / (1.2 * pixel))
    image = torch.where(take(1, 1, 1) < .18, image * rim, image)
    return (image.clamp(0, 1) * 255).round().byte(), label


# ------------------------------------------------------------------------------------------------
# 4. Data: a folder, decoded once
# ------------------------------------------------------------------------------------------------
# Hours are lost to one bad image in a folder, and laptops spend most of a run decoding JPEGs. So
# every image is opened once, before training: checked, turned upright, made RGB, cut to its centred
# square, resized, and written as uint8 into one .npy file. A bad one is named and skipped. After
# that, training only reads rows of that file: no workers, no waiting, same order on every machine.

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
SPLITS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 1, "testing": 1}
NO_PHOTO = ("_segmentation", "_superpixels", "_mask", "_expert")      # ISIC's masks, not photographs


def decode(path, size):
    """A file -> uint8 (3, size, size). Raises OSError or ValueError on what is not a whole image."""
    with warnings.catch_warnings():
        # A picture of 89 megapixels or more is refused: a small file can claim to be gigabytes.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as im:
            im.draft("RGB", (size, size))       # a JPEG decodes at 1/2, 1/4, 1/8 size: 4 times faster
            im = ImageOps.exif_transpose(im)    # trap: cameras store "turn me" beside the pixels
            if im.mode.startswith("I") or im.mode == "F":
                # trap: 16-bit greys; PIL's own conversion to 8 bits clips at 255 and gives white
                a = np.asarray(im, dtype=np.float64)
                top = 65535 if im.mode.startswith("I") and a.max(initial=0) > 255 else max(a.max(initial=1), 1)
                im = Image.fromarray((a / top * 255).clip(0, 255).astype(np.uint8))
            if "A" in im.getbands() or "transparency" in im.info:
                im = im.convert("RGBA")         # trap: what alpha hides is often black garbage
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = ImageOps.fit(im.convert("RGB"), (size, size), Image.Resampling.BOX if min(im.size) > 4 * size
                              else Image.Resampling.BICUBIC)
            return np.asarray(im).transpose(2, 0, 1)


def list_images(folder):
    """All image files under a folder, sorted, as relative paths; and what was passed over, counted."""
    found, other, seen = [], 0, set()
    for base, dirs, names in os.walk(folder, followlinks=True):
        here = os.stat(base)
        if (here.st_dev, here.st_ino) in seen:      # a link back up: would go round for ever
            dirs.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        dirs[:] = [d for d in dirs if not d.startswith(".")]
        for name in names:
            p = Path(base, name)
            if name.startswith(".") or p.suffix.lower() not in SUFFIXES or "-partial" in name \
                    or p.stem.lower().endswith(NO_PHOTO):
                other += 1
            else:
                found.append(p.relative_to(folder).as_posix())
    return sorted(found), other


def read_table(folder):
    """metadata.csv or manifest.csv in the folder or beside it -> {image id: its row}."""
    for p in (*sorted(folder.glob("*metadata*.csv")), *(d / n for d in (folder, folder.parent)
                                                        for n in ("metadata.csv", "manifest.csv"))):
        if p.is_file():
            with open(p, newline="", encoding="utf-8-sig", errors="replace") as f:
                rows = list(csv.DictReader(f))
            ids = [k for k in ("isic_id", "image_id", "image", "name") if rows and k in rows[0]]
            if ids:
                return {row[ids[0]]: row for row in rows}
    return {}


def arrange(folder, names, held_out):
    """Names -> (class of each, is it held out). The folder names say it, else a table, else a hash.

    trap: several photographs show one lesion. Split by image, the network is tested on lesions that
    it trained on. So where lesion_id is known, a whole lesion goes to one side; an image whose
    lesion is unknown beside others that are known is always trained on, since it might be theirs."""
    table, groups, classes, given = read_table(folder), [], [], []
    flat = len({Path(n).parent for n in names}) == 1
    lesions_known = any(row.get("lesion_id") for row in table.values())
    for name in names:
        parts, row = Path(name).parts, table.get(Path(name).stem, {})
        marks = [SPLITS[p.lower()] for p in parts[:-1] if p.lower() in SPLITS]
        given.append(marks[0] if marks else None)
        parent = parts[-2] if len(parts) > 1 and parts[-2].lower() not in SPLITS else ""
        told = next((row[k] for k in ("diagnosis_3", "diagnosis_1", "dx", "class") if row.get(k)), "")
        classes.append(told or parent or "images" if flat else parent or told or "images")
        groups.append(row.get("lesion_id") or ("" if lesions_known else Path(name).stem))
    if any(g == 1 for g in given):
        return classes, [g == 1 for g in given]
    place = {g: int.from_bytes(hashlib.blake2b(g.encode("utf8", "surrogateescape"), digest_size=8).digest(), "big")
             / 2**64 for g in groups}                               # 0…1, the same on every machine
    held = [bool(g) and place[g] < held_out for g in groups]
    if not any(held) or all(held):                                  # a handful of images: take one group
        low = min((g for g in place if g), key=place.get, default="")
        held = [g == low for g in groups]
    return classes, held


class Images:
    """Decoded images on disk. batch(indices) reads some as floats in [-1,1]."""

    def __init__(self, path):
        info = json.loads(path.with_suffix(".json").read_text())
        self.path, self.source, self.names, self.fingerprint = path, info["source"], info["names"], info["key"]
        self.classes, self.labels = info["classes"], torch.tensor(info["labels"])
        held, good = torch.tensor(info["held"]), torch.tensor(info["good"])
        self.train, self.held = (good & ~held).nonzero().flatten(), (good & held).nonzero().flatten()
        if len(self.train) == 0 or len(self.held) == 0:         # one readable image: measure on it too
            self.train = self.held = good.nonzero().flatten()
        self.bad, self.size = info["bad"], info["size"]

    def describe(self):
        """What a checkpoint says about its data."""
        return dict(source=self.source, fingerprint=self.fingerprint, n=len(self.names), classes=self.classes)

    def rows(self, indices):
        # The map is opened anew for each batch: pages of an old one would count as our memory.
        return torch.from_numpy(np.load(self.path, mmap_mode="r")[np.asarray(indices)])

    def batch(self, indices, turns=None):
        """-> (B, 3, H, W) in [-1,1]; turns (B,) in 0…7 picks one of the square's symmetries each."""
        x = self.rows(indices)
        return to_float(x if turns is None else turn(x, turns))


def to_float(x):
    """uint8 0…255 -> [-1,1]: the only range that images have in this program."""
    return x.float() / 127.5 - 1


def to_bytes(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


def turn(x, turns):
    """The eight symmetries of the square, per image: dermoscopy has no up. (B,C,H,H) -> same."""
    out = x.clone()
    for s in range(8):
        y = x[turns == s].flip(3) if s >= 4 else x[turns == s]
        out[turns == s] = y.rot90(s % 4, (2, 3))
    return out


@contextlib.contextmanager
def npy_writer(path, dtype, shape):
    """Write rows of a .npy one after another, without holding them, and atomically."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            np.lib.format.write_array_header_1_0(
                f, dict(descr=np.lib.format.dtype_to_descr(np.dtype(dtype)), fortran_order=False, shape=shape))
            yield lambda rows: f.write(np.ascontiguousarray(rows, dtype=dtype).tobytes())
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def load_images(source, size, n_images, held_out, cfg):
    """'synthetic' or a folder -> Images. Decodes and caches on first use."""
    folder = None if source == "synthetic" else Path(source).expanduser()
    if folder is None:
        names, key = [f"{i:06d}" for i in range(n_images)], ("synthetic", 1, n_images, cfg.seed)
        classes, held = [SYNTHETIC_CLASSES[i % 4] for i in range(n_images)], [False] * n_images
        for i in range(n_images):       # every 1/held_out-th of a class: both sides have all classes
            held[i] = int((i // 4 + 1) * held_out) > int((i // 4) * held_out)
        other = 0
    else:
        if not folder.is_dir():
            raise UserError(f"--data {source}: no such folder; give a folder of images, or 'synthetic'")
        names, other = list_images(folder)
        if not names:
            raise UserError(f"--data {source}: no image found in it ({other} other files); "
                            f"looked for {' '.join(sorted(SUFFIXES))}")
        stats = [(n, (s := os.stat(folder / n)).st_size, s.st_mtime_ns) for n in names]
        classes, held = arrange(folder, names, held_out)
        key = (str(folder.resolve()), stats, classes, held)
    key = hashlib.blake2b(repr((key, size, held_out)).encode("utf8", "surrogateescape"), digest_size=8).hexdigest()
    path = Path(cfg.cache) / f"{'synthetic' if folder is None else folder.resolve().name}-{size}-{key}.npy"
    if not (path.exists() and path.with_suffix(".json").exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        bad = {}

        def one(i):
            try:
                return decode(folder / names[i], size)
            except Exception as e:      # PIL raises nearly anything on a broken file; all of it is named
                bad[i] = " ".join(str(e).split())[:80] or type(e).__name__
                return np.zeros((3, size, size), np.uint8)

        with npy_writer(path, np.uint8, (len(names), 3, size, size)) as write, ThreadPoolExecutor() as pool, \
                tqdm(total=len(names), desc="drawing images" if folder is None else "decoding images",
                     unit="img", disable=None, leave=False) as bar:
            step = 16 if folder is None else 256
            for i in range(0, len(names), step):
                j = min(i + step, len(names))
                write(synthetic(j - i, size, cfg.seed, i)[0].numpy() if folder is None
                      else np.stack(list(pool.map(one, range(i, j)))))
                bar.update(j - i)
        good = [i not in bad for i in range(len(names))]
        kinds = sorted({c for c, ok in zip(classes, good) if ok})
        # Rows of bad files stay in the array as zeros and are never asked for.
        info = dict(source=source, key=key, size=size, names=names, classes=kinds, good=good, held=held,
                    labels=[kinds.index(c) if c in kinds else -1 for c in classes],
                    bad=[f"{names[i]!r} ({bad[i]})" for i in sorted(bad)])
        write_whole(path.with_suffix(".json"), lambda f: f.write(json.dumps(info).encode()))
    images = Images(path)
    if images.bad:
        n, more = len(images.bad), "" if len(images.bad) <= 5 else f" and {len(images.bad) - 5} more"
        named = "; ".join(images.bad[:5]) + more
        if n == len(images.names):
            raise UserError(f"--data {source}: none of the {n} images can be read: {named}")
        if n > 0.2 * len(images.names) and not cfg.allow_bad:
            raise UserError(f"--data {source}: {n} of {len(images.names)} images cannot be read: {named}. "
                            "Mend them, or go on without them with --allow-bad")
        say(f"skipped {n} of {len(images.names)} images that cannot be read: {named}")
    return images


# ------------------------------------------------------------------------------------------------
# 5. Blocks: the five bricks of both networks
# ------------------------------------------------------------------------------------------------
# VQGAN and UNet are built from the same bricks. Two things differ, and both are an argument here:
# the UNet's ResBlocks add a time embedding between their two convolutions (emb_dim), and its
# UpBlocks concatenate what the DownBlock of the same size put out (skip).


def norm(c):
    """GroupNorm with at least four channels a group, for any width (32 groups would ask for 32·n).
    Normalises each image alone, so batch size and number of processes change nothing."""
    return nn.GroupNorm(math.gcd(32, c // 4 or 1, c), c)


def zero(layer):
    """trap: a residual branch that starts as noise makes the first loss large and the start slow.
    From zero weights every block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """GroupNorm, SiLU, Conv, (+ time), GroupNorm, SiLU, Conv, plus the shortcut. Keeps H and W."""

    def __init__(self, c_in, c_out, emb_dim=None):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, c_out) if emb_dim else None
        self.norm2, self.conv2 = norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):                                       # (B,c_in,H,W), (B,E)
        y = self.conv1(F.silu(self.norm1(x)))                             # (B,c_out,H,W)
        if self.emb is not None:
            y = y + self.emb(F.silu(emb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """Every position looks at every other one: the paper's non-local block (VQGAN Table 7).
    Cost grows with (h·w)²: fine on a 16×16 grid, ruinous at full size, so it sits in the middle."""

    def __init__(self, c, heads):
        super().__init__()
        self.norm, self.attention = norm(c), nn.MultiheadAttention(c, heads, batch_first=True)
        zero(self.attention.out_proj)

    def forward(self, x):                                                 # (B,C,h,w)
        y = rearrange(self.norm(x), "B C h w -> B (h w) C")               # (B,N,C)
        # trap: need_weights=True (the default) would hold B·heads·N² numbers and skip flash kernels
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + rearrange(y, "B (h w) C -> B C h w", h=x.shape[2])


class DownBlock(nn.Module):
    """Two ResBlocks, then a strided convolution that halves the grid. Returns both: the halved
    map goes on, the full one is the skip of the UNet (the encoder has no use for it)."""

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
        self.res1, self.attention = ResBlock(c, c, emb_dim), AttentionBlock(c, heads)
        self.res2 = ResBlock(c, c, emb_dim)

    def forward(self, x, emb=None):                                       # (B,C,h,w) -> same
        return self.res2(self.attention(self.res1(x, emb)), emb)


class UpBlock(nn.Module):
    """A transposed convolution that doubles the grid, then (UNet) the skip beside it, then two
    ResBlocks."""

    def __init__(self, c_in, c_out, emb_dim=None, c_skip=0):
        super().__init__()
        # trap: a kernel that is no multiple of the stride (3, 2) paints some pixels more often than
        # others: a checkerboard. With 4, 2, 1 each pixel gets 2×2 taps.
        self.up = nn.ConvTranspose2d(c_in, c_in, 4, stride=2, padding=1)
        self.res1 = ResBlock(c_in + c_skip, c_out, emb_dim)
        self.res2 = ResBlock(c_out, c_out, emb_dim)

    def forward(self, x, emb=None, skip=None):                            # (B,c_in,h,w)
        x = self.up(x)                                                    # (B,c_in,2h,2w)
        if skip is not None:
            x = torch.cat([x, skip], 1)                                   # (B,c_in+c_skip,2h,2w)
        return self.res2(self.res1(x, emb), emb)                          # (B,c_out,2h,2w)


# ------------------------------------------------------------------------------------------------
# 6. Stage 1: the VQGAN
# ------------------------------------------------------------------------------------------------
# The encoder makes the grid small, the codebook makes it discrete, the decoder undoes both. The
# codebook is the delicate part: an argmin has no gradient, and codes that never win never learn.
# What to look at when it fails: codes used (%) and perplexity on the progress line. All codes used
# equally: perplexity K. Collapse: 1.


class Encoder(nn.Module):
    """x -> z: Conv, m DownBlocks, MidBlock, GroupNorm, SiLU, Conv (VQGAN Table 7)."""

    def __init__(self, widths, z_dim, heads):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in zip((widths[0], *widths), widths))
        self.mid = MidBlock(widths[-1], heads)
        self.norm, self.last = norm(widths[-1]), nn.Conv2d(widths[-1], z_dim, 3, padding=1)

    def forward(self, x):                                                 # (B,3,H,W)
        y = self.first(x)
        for block in self.down:
            y, _ = block(y)                                               # grid halves m times
        return self.last(F.silu(self.norm(self.mid(y))))                  # (B,d,h,w)


class Decoder(nn.Module):
    """z_q -> x_hat: the encoder's mirror image."""

    def __init__(self, widths, z_dim, heads):
        super().__init__()
        self.first = nn.Conv2d(z_dim, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1], heads)
        self.up = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths[::-1], (*widths[-2::-1], widths[0])))
        self.norm, self.last = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q):                                               # (B,d,h,w)
        y = self.mid(self.first(z_q))
        for block in self.up:
            y = block(y)                                                  # grid doubles m times
        y = F.silu(self.norm(y))
        # The last layer is where lam (6) is measured: its input, weight and gradient are fp32.
        with torch.autocast(y.device.type, enabled=False):
            return self.last(y.float())                                   # (B,3,H,W)


class Codebook(nn.Module):
    """Replaces each vector of z by the nearest of K learned ones (VQ eq. 1-3)."""

    def __init__(self, codes, z_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, z_dim)                       # e: (K,d)
        # How often each code won, summed since the last revival; -1: not started from data yet.
        self.register_buffer("usage", torch.full((codes,), -1.0))

    def nearest(self, z):
        """(B,d,h,w) -> k (B,h,w): (1)."""
        B, d, h, w = z.shape
        # Only the winner's number is used, so distances need no gradient, but they need fp32.
        # trap: in bf16 5-15 % of the codes come out wrong; and flat, not batched, else the codebook
        # is repeated B times in memory.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z.float(), "B d h w -> (B h w) d")
            return torch.cdist(flat, self.embedding.weight.float()).argmin(1).view(B, h, w)    # (1)

    def lookup(self, k):
        """k (B,h,w) -> z_q (B,d,h,w)."""
        return rearrange(self.embedding(k), "B h w d -> B d h w")

    @torch.no_grad()
    def settle(self, z):
        """Draw outliers of z towards their code until they are within one code spacing of it. A code's
        cell is convex and contains it, so the nearest code stays the same. (B,d,h,w) -> same."""
        e = self.embedding.weight[:4096]
        spacing = torch.cdist(e, e).fill_diagonal_(math.inf).amin(1).median()
        z_q = self.lookup(self.nearest(z))
        away = (z - z_q).norm(dim=1, keepdim=True)                        # (B,1,h,w)
        return z_q + (z - z_q) * (spacing / away.clamp(min=1e-12)).clamp(max=1)

    def forward(self, z):                                                 # (B,d,h,w)
        z = z.float()
        k = self.nearest(z)                                               # (B,h,w)
        z_q = self.lookup(k)                                              # (B,d,h,w)
        # Two halves of one distance: sg[] (detach) decides who moves. The codebook's half draws
        # each code to the vectors it won, the commitment's half draws the encoder to its code.
        # trap: swapped weights (beta on the codebook's half) are off by a factor of 16 at 0.25.
        codebook_loss = F.mse_loss(z_q, z.detach())                                            # (3)
        commit_loss = F.mse_loss(z, z_q.detach())                                              # (4)
        # The value of z_q with the gradient of z. Rounding has no slope of its own, so the
        # decoder's wish for z_q is passed to z unchanged: a lie, but one that points downhill as
        # long as z and z_q are close, which is what (3) and (4) see to.
        # trap: both losses belong above this line; below it z_q no longer depends on the codes.
        z_q = z + (z_q - z).detach()                                                           # (2)
        return z_q, k, codebook_loss, commit_loss

    @torch.no_grad()
    def count_and_revive(self, z, k, generator, every, step):
        """Count who won; at step 0 and then every so many steps move dead codes to where data is.

        trap: the usual start U(-1/K, 1/K) sits at the origin. Where the encoder's outputs do not,
        a few codes win everything and the rest never get a gradient: the collapse. Here all codes
        start as encoder outputs, and one that won nothing since the last revival starts again."""
        usage = sum_over_processes(torch.bincount(k.flatten(), minlength=len(self.usage)).float())
        start = bool(self.usage[0] < 0)
        self.usage.copy_(usage if start else self.usage + usage)
        if not start and (step + 1) % every:
            return 0
        dead = torch.ones_like(usage, dtype=torch.bool) if start else self.usage == 0          # (K,)
        flat = rearrange(z.detach().float(), "B d h w -> (B h w) d")
        n = int(dead.sum())
        pick = torch.randint(len(flat), (n,), generator=generator).to(flat.device)
        new = flat[pick] + 0.01 * flat.std(0) * torch.randn(n, flat.shape[1], generator=generator).to(flat)
        if world() > 1:
            dist.broadcast(new, 0)      # all processes must own the same codebook
        self.embedding.weight[dead] = new
        self.usage.zero_()
        return n


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Images in [-1,1] of any size that is a multiple of f."""

    def __init__(self, widths, z_dim, codes, heads):
        super().__init__()
        self.encoder = Encoder(widths, z_dim, heads)
        self.codebook = Codebook(codes, z_dim)
        self.decoder = Decoder(widths, z_dim, heads)
        self.f = 2 ** len(widths)

    def encode(self, x):
        """x (B,3,H,W) -> z (B,d,h,w), before quantisation: what stage 2 diffuses."""
        return self.encoder(x).float()

    def decode(self, z):
        """z (B,d,h,w) -> nearest codes -> x_hat (B,3,H,W).
        trap: the decoder has only ever seen codes, so what stage 2 makes is quantised here too."""
        return self.decoder(self.codebook.lookup(self.codebook.nearest(z)))

    def forward(self, x):
        """-> x_hat, z, k, codebook loss (3), commitment loss (4)."""
        z = self.encode(x)
        z_q, k, codebook_loss, commit_loss = self.codebook(z)
        return self.decoder(z_q), z, k, codebook_loss, commit_loss


# ------------------------------------------------------------------------------------------------
# 7. Stage 1: the losses
# ------------------------------------------------------------------------------------------------
# Pixel distance alone gives blur: the mean of all sharp images that fit. LPIPS compares what a
# trained network sees, the discriminator learns what still gives a reconstruction away. The three
# pull with very different strength, and lam (6) is what keeps the last from winning.


class PatchDiscriminator(nn.Module):
    """pix2pix's patch critic: one real-or-fake logit for each patch (B,1,h',w'), not per image.

    trap: no sigmoid at the end, the hinge loss wants raw logits. GroupNorm where pix2pix has
    BatchNorm: real and fake may then share one pass, and processes need not share statistics."""

    def __init__(self, widths):
        super().__init__()
        layers = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), norm(b), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x):                                                 # (B,3,H,W)
        return self.layers(x).float()                                     # (B,1,h',w')


def hinge_loss(real, fake):
    """D's loss from its raw logits: real above 1 and fake below -1 cost nothing more."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2                             # (7)


def adaptive_weight(l_rec, l_gan, x_hat, last, delta=1e-4, cap=1e4):
    """lam of (6), and the gradients of both losses with respect to x_hat, for the backward pass.

    Why adaptive: the discriminator's gradient can be a thousand times larger or smaller than the
    reconstruction's, and changes as D learns. Scaled so that both push the decoder's last layer
    equally hard, neither can drown the other.
    By the chain rule ∇_L loss = (∂x_hat/∂L)ᵀ ∂loss/∂x_hat: each loss is walked back once to x_hat,
    then one convolution more to L. Two full backward passes would cost a third of the step.
    trap: lam must be a number, not part of the graph (detached), fp32, and capped, since an
    untrained D has almost no gradient. -> lam (), ∂l_rec/∂x_hat, ∂l_gan/∂x_hat"""
    d_rec, = torch.autograd.grad(l_rec, x_hat)
    d_gan, = torch.autograd.grad(l_gan, x_hat)

    def norm_at_last(d):
        g, = torch.autograd.grad(x_hat, last, d, retain_graph=True)
        return (sum_over_processes(g.float()) / world()).norm()

    lam = norm_at_last(d_rec) / (norm_at_last(d_gan) + delta)                                  # (6)
    return lam.clamp(0, cap).detach(), d_rec, d_gan


class Perceptual:
    """LPIPS (Zhang et al. 2018) and, from the same network, features for the Fréchet distance.

    trap: not an nn.Module and not inside one. There .train() would switch its dropout on, and each
    checkpoint would carry its weights. Frozen, eval, fp32, images in [-1,1]."""

    def __init__(self, name, device):
        socket.setdefaulttimeout(20)            # no network: say so soon
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(The parameter 'pretrained'|Arguments other than a weight)")
            import lpips
            self.net = lpips.LPIPS(net=name, verbose=False).to(device).eval().requires_grad_(False)
        self.name = name
        x = torch.rand(1, 3, 64, 64, generator=rng("lpips")).to(device) * 2 - 1
        # trap: with heads or trunk not loaded the distance is random, even negative
        if abs(float(self(x, x))) > 1e-4 or not float(self(x, -x)) > 0.01:
            raise UserError(f"--lpips {name}: its weights are damaged, distances make no sense; delete the files in "
                            f"{torch.hub.get_dir()}/checkpoints to load them again")

    def __call__(self, x, x_hat):
        """Mean perceptual distance of two batches (B,3,H,W) in [-1,1]. Gradient only for x_hat."""
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x.float(), x_hat.float()).mean()

    @torch.no_grad()
    def features(self, x):
        """(B,3,H,W) in [-1,1] -> (B,C): the trunk's last map at 224×224, averaged over space."""
        x = F.interpolate((x.float() + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
        return self.net.net(self.net.scaling_layer(x * 2 - 1))[-1].mean((2, 3)).double()


def load_perceptual(wanted, device):
    """-> (Perceptual or None, the name to record). 'auto' goes on without, but says so loudly."""
    if wanted == "off":
        return None, "off"
    name = "squeeze" if wanted == "auto" else wanted
    size = {"squeeze": "5 MB", "alex": "233 MB", "vgg": "528 MB"}[name]
    try:
        return first_then_others(lambda: Perceptual(name, device)), name
    except UserError:
        raise
    except Exception as e:
        where = Path(torch.hub.get_dir()) / "checkpoints"
        text = (f"LPIPS's {name} weights ({size}) are not in {where} and cannot be downloaded "
                f"({type(e).__name__}); copy them there, or set TORCH_HOME")
        if wanted != "auto":
            raise UserError(f"--lpips {name}: {text}, or run with --lpips off") from None
        say(f"WARNING {text}. Going on WITHOUT the perceptual loss: expect blurrier reconstructions.")
        return None, "off"


# ------------------------------------------------------------------------------------------------
# 8. Keeping a run (skip on a first reading)
# ------------------------------------------------------------------------------------------------
# A night of training is lost in three ways: a checkpoint half written when the power went, a resume
# that restores the weights but not the rest, and settings that silently differ. Here a checkpoint
# appears whole or not at all, everything that a step depends on is in it or is a function of the
# seed and the step (see rng), and differing settings are refused.

FORMAT = 1                  # of the checkpoint: a program that changes its meaning counts up
STAGES = {"vq": VQConfig, "ldm": LDMConfig}
LOG_EVERY = 10              # steps between two lines of log.csv
SAVE_EVERY = 300            # seconds between two checkpoints inside a long epoch


def write_whole(path, write):
    """A file appears complete or not at all: written aside, flushed to the disk, renamed.
    trap: torch.save straight onto the old file leaves neither old nor new when killed half way."""
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
    if os.name == "posix":      # the new name lives in the folder, which has a flush of its own
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load_checkpoint(where, kinds, flag_name):
    """A checkpoint or run folder -> its dict.

    trap: torch.load without weights_only=True runs whatever code a stranger put into the file.
    With it, tensors, numbers, strings, lists and dicts are read and everything else is refused."""
    path = Path(where).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    need = " or ".join(f"train-{k}" for k in kinds)
    if not path.is_file():
        raise UserError(f"{flag_name} {where}: no checkpoint there; python vqldm.py {need} makes one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT or state["kind"] not in STAGES:
            raise ValueError("other format")
        if state["kind"] in kinds:
            for part in ([state, state["vq"]] if state["kind"] == "ldm" else [state]):
                part["config"] = check_values(STAGES[part["kind"]], part["config"])
    except Exception as e:
        raise UserError(f"{flag_name} {path}: not a whole checkpoint of this program "
                        f"({type(e).__name__}); none of it was run. Give one made by {need}") from None
    if state["kind"] not in kinds:
        raise UserError(f"{flag_name} {path}: made by train-{state['kind']}, but one made by {need} is needed")
    return state


def load_weights(net, weights, path):
    try:
        net.load_state_dict(weights)
    except Exception as e:
        raise UserError(f"{path}: its weights do not fit its own settings; the file is damaged or was "
                        f"tampered with ({type(e).__name__})") from None
    return net


class Run:
    """A run's folder: its lock, its checkpoint, its log, and the wish to stop."""

    def __init__(self, cfg, kind):
        self.kind, self.folder, self.state, self.lock = kind, Path(cfg.out), None, None
        self.signal, self.log, self.best, self.step, self.bad, self.seconds = 0, [], math.inf, 0, 0, 0.0
        last = self.folder / "last.pt"
        if cfg.resume and last.exists():
            self.state = load_checkpoint(last, [kind], "--resume")
        elif cfg.resume:
            say(f"Nothing to resume in {self.folder} yet: starting from the beginning.")
        elif last.exists() and not cfg.overwrite:
            raise UserError(f"--out {self.folder}: already holds a run; add --resume to go on with it, --overwrite "
                            "to replace it, or give another --out")
        if self.state:
            for name in ("log", "best", "step", "bad", "seconds"):
                setattr(self, name, self.state[name])
        if rank() == 0:
            make_folder(self.folder)
            self.lock = lock_folder(self.folder)
            if not self.state:
                for p in self.folder.iterdir():         # only what a run writes; never somebody's files
                    if p.suffix in (".pt", ".png", ".csv", ".tmp", ".json"):
                        p.unlink()

    def __enter__(self):
        """From here Ctrl-C and SIGTERM only ask: the step is finished and saved. A second one kills."""
        def ask(number, frame):
            self.signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        self.started = self.saved = time.monotonic()
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()

    def clock(self, cfg):
        """-> (seconds of training in this session, signal that asks to stop), equal on all processes."""
        both = torch.tensor([time.monotonic() - self.started, float(self.signal)], dtype=torch.float64)
        if world() > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        self.elapsed, self.signal = float(both[0]), int(both[1])
        if cfg.minutes and self.elapsed > cfg.minutes * 60:
            return self.elapsed, self.signal or -1
        return self.elapsed, self.signal

    def save(self, cfg, names, **state):
        """Write the checkpoint under each of the names, and the log as log.csv."""
        if rank() == 0:
            state = dict(format=FORMAT, kind=self.kind, config=asdict(cfg), step=self.step, log=self.log,
                         best=self.best, bad=self.bad, seconds=self.seconds + time.monotonic() - self.started,
                         versions=f"torch {torch.__version__}, python {sys.version.split()[0]}", **state)
            state["config"] = {k: list(v) if isinstance(v, tuple) else v for k, v in state["config"].items()}
            for name in names:
                write_whole(self.folder / name, lambda f: torch.save(state, f))
            columns = list(dict.fromkeys(k for row in self.log for k in row))
            text = [",".join(columns)] + [",".join(f"{row[k]:.6g}" if k in row else "" for k in columns)
                                          for row in self.log]
            write_whole(self.folder / "log.csv", lambda f: f.write("\n".join(text + [""]).encode()))
        self.saved = time.monotonic()

    def finite(self, grad_norm, **losses):
        """False: skip this step. One bad batch must not end a night; five in a row mean divergence.
        (Reading the number waits for the device: the one such wait in a step.)"""
        if math.isfinite(float(grad_norm)):
            self.bad = 0
            return True
        self.bad += 1
        names = [k for k, v in losses.items() if not math.isfinite(float(v))] or ["gradient"]
        say(f"WARNING step {self.step}: {', '.join(names)} not finite; step skipped")
        if self.bad >= 5:
            raise UserError(f"step {self.step}: {', '.join(names)} not finite five times in a row, so the run stops. "
                            f"The last good checkpoint is untouched; try a lower --lr, or --precision fp32")
        return False


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {path}: cannot make this folder ({e.strerror})") from None


def lock_folder(folder):
    """Two runs must not write into one folder. The lock belongs to the process, not to the file, so
    a killed run leaves none behind."""
    f = open(folder / ".lock", "w")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        f.close()
        raise UserError(f"--out {folder}: another run is writing there now; give another --out") from None
    return f


def batch_of(seed, step, size, n):
    """Which of n images make up the global batch of a step: the next ones of an endless row of
    shuffled epochs. Returns (indices (size,), the epoch that it ends in)."""
    places, orders = range(step * size, (step + 1) * size), {}
    for epoch in {p // n for p in places}:
        orders[epoch] = torch.randperm(n, generator=rng(seed, "order", epoch))
    return torch.stack([orders[p // n][p % n] for p in places]), ((step + 1) * size) // n


def learning_rate(cfg, step, total, elapsed):
    """Factor on --lr: up over the first --warmup steps, down to 0 over the last part of the run.
    With --minutes the run's length is whichever ends first, steps or minutes."""
    done = max(step / total, elapsed / (cfg.minutes * 60) if cfg.minutes else 0)
    up = min(1.0, (step + 1) / (cfg.warmup + 1))
    return up * (min(1.0, max(1 - done, 0.01) / cfg.decay) if cfg.decay else 1.0)


def take_step(optimizer, params, factor, clip, run, **losses):
    """After backward: average over processes, clip, step. False if the step had to be skipped."""
    average_gradients(params)
    if not run.finite(nn.utils.clip_grad_norm_(params, clip), **losses):
        return False
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    optimizer.step()
    return True


def make_optimizer(params, lr, betas):
    return torch.optim.Adam([dict(params=params, initial_lr=lr)], lr=lr, betas=betas, fused=True)


def memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
    except ImportError:         # Windows
        return float("nan")


def progress_bar(start, total, name):
    """One line that is rewritten in a terminal; in a file, one line every half minute."""
    live = sys.stderr.isatty()
    return tqdm(range(start, total), initial=start, total=total, desc=name, disable=rank() > 0, unit="step",
                mininterval=0.5 if live else 30, dynamic_ncols=True, leave=False,
                bar_format="{desc} {n}/{total} {postfix} | {elapsed}<{remaining}")


# ------------------------------------------------------------------------------------------------
# 9. Stage 1: training
# ------------------------------------------------------------------------------------------------
# Two players, one straight line. The generator (encoder, codebook, decoder) takes its step first,
# with D frozen; then D takes its step on the same images. In the beginning D is not called at all;
# shortly before gan_start it trains alone; then its wish fades in.
# What to look at: rec and perc fall. codes rises towards 100 %, perplexity towards some hundred.
# Once the GAN is on, D(real) and D(fake) stay on both sides of 0 within ±1; both at 0: D is blind,
# at ±1 and more: D has won. lam at its cap of 10000: D has no gradient yet.


def start_stage(cfg, typed, kind):
    """What both stages do first: folder, settings, device. -> run, cfg, device, dtype."""
    run = Run(cfg, kind)
    if run.state:
        cfg = settings(type(cfg), typed, run.state["config"])
    device, dtype, where = pick_device(cfg)
    say(where)
    torch.manual_seed(cfg.seed)             # first weights: the only draw from the global generator
    return run, cfg, device, dtype


def get_images(cfg, source, vq_cfg):
    """Decode (first process) or read (the others) the images, and say what was found."""
    images = first_then_others(lambda: load_images(source, vq_cfg.size, vq_cfg.n_images, vq_cfg.held_out, cfg))
    counts = torch.bincount(images.labels[torch.cat([images.train, images.held]).unique()],
                            minlength=len(images.classes)).tolist()
    classes = ", ".join(f"{c} {n}" for c, n in zip(images.classes, counts))
    say(f"data {images.source}: {len(images.train)} images to train on, {len(images.held)} held out; "
        f"{len(images.classes)} classes: {classes}")
    if len(images.train) < 100:
        say(f"WARNING only {len(images.train)} images to train on: the networks will learn them by heart")
    return images


def count(net):
    n = sum(p.numel() for p in net.parameters())
    return f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n / 1e3:.1f} k"


def keep_picture(epoch, epochs):
    """About ten pictures a run, the first and the last epoch among them."""
    return epoch in (1, epochs) or epoch % max(1, epochs // 10) == 0


def finish(run, cfg, total, without, then):
    """The last lines of a training run, and its exit status."""
    if run.signal > 0:
        say(f"stopped at step {run.step} of {total}, saved. Go on with the same command and --resume")
        return 128 + run.signal
    if run.step < total:
        say(f"--minutes {cfg.minutes:g} are over at step {run.step} of {total}, saved; --resume goes on")
    if without:
        say("NOTE trained WITHOUT the perceptual loss, since LPIPS's weights were not to be had")
    say(f"pictures in {run.folder}. Next: {then}")
    return 0


@torch.no_grad()
def measure_vq(vqgan, images, indices, perceptual, device, dtype, batch=50):
    """Reconstruct held-out images one batch after another and compare. -> metrics, x, x_hat (uint8)."""
    sums, usage, keep = {}, torch.zeros(len(vqgan.codebook.usage)), []
    for idx in indices.split(batch):
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
        for name, value in one.items():
            sums[name] = sums.get(name, 0) + float(value) * len(idx) / len(indices)
        keep.append((to_bytes(x.cpu()), to_bytes(x_hat.cpu())))
    p = usage / usage.sum()
    sums["codes_used_percent"] = 100 * float((usage > 0).float().mean())
    sums["perplexity"] = float(torch.exp(-(p * p.clamp(min=1e-12).log()).sum()))
    return dict(sums, n=len(indices)), *(torch.cat(side) for side in zip(*keep))


def ssim(u, v):
    """Structural similarity (Wang et al. 2004) of images in 0…1: 11×11 Gaussian window, σ = 1.5."""
    w = torch.exp(-(torch.arange(11.0) - 5) ** 2 / 4.5)
    w = (w[:, None] * w / w.sum() ** 2).expand(3, 1, 11, 11).to(u)
    pad = 5 if min(u.shape[2:]) < 22 else 0                 # tiny images would have no window at all
    def blur(i): return F.conv2d(i, w, groups=3, padding=pad)
    mu, mv = blur(u), blur(v)
    suu, svv, suv = blur(u * u) - mu * mu, blur(v * v) - mv * mv, blur(u * v) - mu * mv
    return (((2 * mu * mv + 1e-4) * (2 * suv + 9e-4))
            / ((mu ** 2 + mv ** 2 + 1e-4) * (suu + svv + 9e-4))).mean()


def train_vq(cfg, typed):
    run, cfg, device, dtype = start_stage(cfg, typed, "vq")
    images = get_images(cfg, cfg.data, cfg)
    wanted = run.state["lpips"] if run.state else cfg.lpips         # on resume: what the run began with
    perceptual, lpips_name = load_perceptual(wanted, device)

    vqgan = VQGAN(cfg.widths, cfg.z_dim, cfg.codes, cfg.heads)
    disc = PatchDiscriminator(cfg.d_widths)
    if run.state:
        load_weights(vqgan, run.state["model"], run.folder), load_weights(disc, run.state["disc"], run.folder)
    vqgan.to(device, memory_format=torch.channels_last), disc.to(device, memory_format=torch.channels_last)
    opt = make_optimizer(list(vqgan.parameters()), cfg.lr, (0.5, 0.9))
    opt_d = make_optimizer(list(disc.parameters()), cfg.d_lr, (0.5, 0.9))
    if run.state:
        opt.load_state_dict(run.state["opt"]), opt_d.load_state_dict(run.state["opt_d"])
    forward = torch.compile(vqgan) if cfg.compile else vqgan
    params, params_d, last = list(vqgan.parameters()), list(disc.parameters()), vqgan.decoder.last.weight

    n, B = len(images.train), cfg.batch_size
    total = math.ceil(cfg.epochs * n / B)
    use_gan = cfg.gan_weight > 0
    gan_step, ramp = round(cfg.gan_start * n / B), max(1, round(cfg.gan_ramp * n / B))
    d_step = gan_step - round(cfg.d_warmup * n / B)
    say(f"VQGAN {count(vqgan)} parameters, D {count(disc)}; {cfg.epochs} epochs = {total} steps of {B}; "
        + (f"GAN from step {gan_step}; " if use_gan and gan_step < total else "no GAN within this run; ")
        + f"LPIPS {lpips_name}; writing to {run.folder}")
    if total < 500 and cfg.preset != "tiny":
        say(f"WARNING {total} steps are few: expect mush. More images, more --epochs or a smaller --batch-size help")
    shown = images.held[:8]
    if not run.state and rank() == 0:
        draw_preview(run.folder / "data_preview.png", images)

    def state():
        return dict(model=vqgan.state_dict(), disc=disc.state_dict(), opt=opt.state_dict(), opt_d=opt_d.state_dict(),
                    lpips=lpips_name, data=images.describe())

    with run, progress_bar(run.step, total, "train-vq") as bar:
        waited, g_adv, lam, d_loss = 0.0, None, None, None
        for step in bar:
            elapsed, stop = run.clock(cfg)
            if stop:
                break
            # ---- learn: the generator ---------------------------------------------------------
            tick = time.monotonic()
            chosen, epoch = batch_of(cfg.seed, step, B, n)
            turns = torch.randint(8, (B,), generator=rng(cfg.seed, "turns", step))
            x = images.batch(images.train[share(chosen)], share(turns)).to(device)            # (B,3,H,W)
            x = x.contiguous(memory_format=torch.channels_last)
            waited += time.monotonic() - tick
            if step == 0:       # the codes start as encoder outputs
                with torch.no_grad(), autocast(device, dtype):
                    z = vqgan.encode(x)
                vqgan.codebook.count_and_revive(z, vqgan.codebook.nearest(z), rng(cfg.seed, "start"), 1, 0)
            factor = learning_rate(cfg, step, total, elapsed)

            with autocast(device, dtype):
                x_hat, z, k, codebook_loss, commit_loss = forward(x)
            rec = F.mse_loss(x_hat, x)                                                         # (5)
            perc = perceptual(x, x_hat) if perceptual else rec.new_zeros(())
            l_rec = rec + cfg.perceptual_weight * perc
            l_vq = cfg.codebook_weight * codebook_loss + cfg.commit_weight * commit_loss
            opt.zero_grad(set_to_none=True)
            if use_gan and step >= gan_step:
                # trap: without this line the generator's backward would also fill D's gradients;
                # zeroed too late, they make D(fake) settle at 0.65 instead of below 0.
                disc.requires_grad_(False)
                with autocast(device, dtype):
                    g_adv = -disc(x_hat).mean()                                                # (7)
                lam, d_rec, d_gan = adaptive_weight(l_rec, g_adv, x_hat, last)
                disc.requires_grad_(True)
                fade = cfg.gan_weight * min(1.0, (step - gan_step + 1) / ramp)
                torch.autograd.backward([x_hat, l_vq], [d_rec + fade * lam * d_gan, None])     # (5)
            else:
                (l_rec + l_vq).backward()
            losses = dict(rec=rec, perc=perc, codebook=codebook_loss, commit=commit_loss)
            if g_adv is not None:
                losses.update(g_adv=g_adv, lam=lam)
            if take_step(opt, params, factor, cfg.clip, run, **losses):
                generator = rng(cfg.seed, "revive", step)
                vqgan.codebook.count_and_revive(z, k, generator, cfg.revive_every, step)

                # ---- learn: the discriminator -------------------------------------------------
                if use_gan and step >= d_step:
                    # trap: without detach D's loss would teach the generator to be found out.
                    with autocast(device, dtype):
                        real, fake = disc(torch.cat([x, x_hat.detach()])).chunk(2)
                    d_loss = hinge_loss(real, fake)                                            # (7)
                    opt_d.zero_grad(set_to_none=True)
                    d_loss.backward()
                    losses.update(d_loss=d_loss, d_real=real.mean(), d_fake=fake.mean())
                    take_step(opt_d, params_d, factor, cfg.clip, run, **losses)
            run.step = step + 1

            # ---- report -----------------------------------------------------------------------
            new_epoch = epoch > step * B // n or run.step == total
            if run.step % LOG_EVERY == 0 or new_epoch:
                row = {name: float(v.detach()) for name, v in losses.items()}
                run.log.append(dict(step=run.step, epoch=run.step * B / n, lr=cfg.lr * factor, **row))
                speed = (run.step - bar.initial) * B / (time.monotonic() - run.started)
                bar.set_postfix_str(f"epoch {epoch}/{cfg.epochs} " + " ".join(
                    f"{name} {v:.3g}" for name, v in row.items()) + f" | {speed:.0f} img/s wait "
                    f"{100 * waited / (time.monotonic() - run.started):.0f}% {memory_gb(device):.1f} GB", refresh=False)
            names = ["pre_gan.pt"] if use_gan and run.step == gan_step else []
            if new_epoch and rank() == 0:
                vqgan.eval()
                m, real_x, fake_x = measure_vq(vqgan, images, images.held[:256], perceptual, device, dtype)
                vqgan.train()
                run.log.append(dict(step=run.step, epoch=run.step * B / n, **{"held_" + k: v for k, v in m.items()}))
                score = m["rec"] + cfg.perceptual_weight * m.get("lpips", 0)
                if score < run.best:
                    run.best = score
                    names.append("best.pt")
                say(f"epoch {epoch:3d}  held out: PSNR {m['psnr']:.2f} dB, SSIM {m['ssim']:.3f}, "
                    + (f"LPIPS {m['lpips']:.3f}, " if perceptual else "")
                    + f"codes used {m['codes_used_percent']:.0f} %, perplexity {m['perplexity']:.0f}")
                if m["codes_used_percent"] < 20 and epoch > 1:
                    say("WARNING few codes are used: more training, a lower --commit-weight or a smaller --revive-every")
                if keep_picture(epoch, cfg.epochs):
                    draw_rows(run.folder / f"recon_epoch_{epoch:03d}.png",
                              {"original": real_x[:len(shown)], "reconstruction": fake_x[:len(shown)]})
                draw_curves(run.folder / "curves.png", run.log, "VQGAN")
                draw_codes(run.folder / "codebook.png", vqgan, images, device, dtype)
            if new_epoch or names or time.monotonic() - run.saved > SAVE_EVERY:
                run.save(cfg, ["last.pt", *names], **state())
        run.save(cfg, ["last.pt"], **state())
    return finish(run, cfg, total, lpips_name if perceptual is None else None,
                  f"python vqldm.py train-ldm --vq {run.folder}")


# ------------------------------------------------------------------------------------------------
# 10. Stage 2: diffusion
# ------------------------------------------------------------------------------------------------
# Noise is added to a latent in T small steps until nothing is left of it; a network learns to say
# what was added; sampling walks back. All of the mathematics is in this class, none of it knows
# what the network looks like. The network may answer with eps or with v; predict() turns either
# into (z0_hat, eps_hat), and the samplers only know these two.


class Diffusion:
    """The noise schedule of DDPM, its loss (Algorithm 1) and its samplers (Algorithm 2, DDIM).

    beta, alpha, alpha_bar: (T,) float32, made in float64; index t = 0 is the least noise."""

    def __init__(self, T, schedule="linear", target="v"):
        self.T, self.target = T, target
        t = torch.arange(T + 1, dtype=torch.float64)
        if schedule == "linear":
            # trap: 1e-4 and 0.02 belong to T = 1000. Unscaled, T = 50 ends at alpha_bar = 0.60 and
            # sampling starts from noise that the network never saw.
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        elif schedule == "cosine":                  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
            f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"schedule {schedule!r}: linear or cosine")
        beta = beta.clamp(max=0.999)
        alpha_bar = torch.cumprod(1 - beta, 0)                                # (T,)           (8)
        if alpha_bar[-1] > 0.01:
            raise ValueError(f"T = {T}: too few steps, alpha_bar ends at {alpha_bar[-1]:.2f} instead of near 0")
        self.beta, self.alpha, self.alpha_bar = (a.float() for a in (beta, 1 - beta, alpha_bar))

    def at(self, t, z):
        """alpha_bar at steps t, shaped to multiply z; 1, no noise at all, at t = -1."""
        t = torch.as_tensor(t, device=z.device)
        a = torch.where(t >= 0, self.alpha_bar.to(z.device)[t.clamp(min=0)], 1.0)
        return a.view(-1, *[1] * (z.dim() - 1))

    def add_noise(self, z0, t, eps):
        """q(z_t | z_0) in one go: (B,d,h,w), (B,), (B,d,h,w) -> z_t."""
        a = self.at(t, z0)
        return a.sqrt() * z0 + (1 - a).sqrt() * eps                                            # (9)

    def loss(self, net, z0, t, eps, label=None):
        """Algorithm 1: the squared error of each image's prediction, (B,). 1 = predicts nothing."""
        a, z_t = self.at(t, z0), self.add_noise(z0, t, eps)
        goal = eps if self.target == "eps" else a.sqrt() * eps - (1 - a).sqrt() * z0           # (12)
        return (net(z_t, t, label).float() - goal).square().flatten(1).mean(1)                 # (10)

    def predict(self, out, z_t, t):
        """The network's answer -> (z0_hat, eps_hat), whichever it was trained to give.
        trap: with eps as the target z0_hat divides the network's error by √alpha_bar, which at
        t = T-1 multiplies it by 158; a network trained briefly then gives latents with a std of
        1.8 to 3.3 instead of 1. v has no such division, so it is the default.
        trap: no clipping of z0_hat to ±1: latents are no pixels, it would cost a third of their std."""
        a = self.at(t, z_t)
        if self.target == "eps":
            return (z_t - (1 - a).sqrt() * out) / a.sqrt(), out                                # (9)
        return a.sqrt() * z_t - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * z_t    # (12)

    def pairs(self, steps, levels=None):
        """Exactly `steps` pairs (t, t_prev) from levels-1 down to -1, for any 1 <= steps <= levels.
        trap: range(0, T, T // steps) gives too many or too few for most values of steps."""
        levels = levels or self.T
        t = [levels * (steps - i) // steps - 1 for i in range(steps)]
        return list(zip(t, [*t[1:], -1]))

    @torch.no_grad()
    def sample(self, net, z, steps, sampler="ddim", eta=1.0, noise=None, levels=None):
        """Walk back from noise. Yields (z_t, z0_hat) after each step; the last z_t is z0.

        net(z_t, t) -> eps or v. z: (B,d,h,w), standard normal, or a latent noised to `levels` steps
        (add_noise at t = levels-1). noise(): fresh standard normal numbers like z.
        trap: kept steps are further apart than the trained ones, so alpha_t of (11) is recomputed
        from them; with the trained alpha_t, 50 steps would hardly move."""
        noise = noise or (lambda: torch.randn_like(z))
        for t, prev in self.pairs(steps, levels):
            time = torch.full((len(z),), t, device=z.device)
            a, a_prev = self.at(t, z), self.at(prev, z)             # alpha_bar_t, alpha_bar_{t-1}
            z0_hat, eps_hat = self.predict(net(z, time).float(), z, time)
            if sampler == "ddpm":
                alpha = a / a_prev
                z = (z - (1 - alpha) / (1 - a).sqrt() * eps_hat) / alpha.sqrt()                # (11)
                sigma = (1 - alpha).sqrt()
            else:
                # eta = 0: no fresh noise, a fixed path. eta = 1: as much as DDPM (DDIM eq. 16).
                sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
                z = a_prev.sqrt() * z0_hat + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * eps_hat
            if prev >= 0 and float(sigma) > 0:
                # trap: no noise after the last step, or a grain of sigma = 0.01 stays in each image.
                z = z + sigma * noise()                                                   # (11), (13)
            yield z, z0_hat


# ------------------------------------------------------------------------------------------------
# 11. Stage 2: the UNet
# ------------------------------------------------------------------------------------------------
# The same bricks as the VQGAN. New are the time (how noisy is z_t?), which every ResBlock gets, and
# the skips, which carry fine detail around the bottleneck: noise has no compact description.


def time_embedding(t, dim):
    """t (B,) -> (B, dim): sines and cosines of growing period, as in the Transformer."""
    freq = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freq                                     # (B, dim/2)
    return torch.cat([angle.sin(), angle.cos()], 1)


class UNet(nn.Module):
    """(z_t, t, class) -> eps_hat or v_hat, (B,d,h,w). Class n_classes means "not told"."""

    def __init__(self, z_dim, widths, heads, n_classes=0):
        super().__init__()
        self.width, self.n_classes, E = widths[0], n_classes, 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], E), nn.SiLU(), nn.Linear(E, E))
        self.label = nn.Embedding(n_classes + 1, E) if n_classes else None
        self.first = nn.Conv2d(z_dim, widths[0], 3, padding=1)
        self.down = nn.ModuleList(DownBlock(a, b, E) for a, b in zip((widths[0], *widths), widths))
        self.mid = MidBlock(widths[-1], heads, E)
        self.up = nn.ModuleList(UpBlock(a, b, E, c_skip=a)
                                for a, b in zip(widths[::-1], (*widths[-2::-1], widths[0])))
        self.norm, self.last = norm(widths[0]), zero(nn.Conv2d(widths[0], z_dim, 3, padding=1))

    def forward(self, z_t, t, label=None):                                # (B,d,h,w), (B,), (B,)
        emb = self.time(time_embedding(t, self.width))                    # (B,E)
        if self.label is not None:
            # The class joins the time embedding, so the blocks need not know about classes.
            label = torch.full_like(t, self.n_classes) if label is None else label
            emb = emb + self.label(label)
        y, skips = self.first(z_t), []
        for block in self.down:
            y, skip = block(y, emb)                                       # grid halves
            skips.append(skip)
        y = self.mid(y, emb)
        for block in self.up:
            y = block(y, emb, skips.pop())                                # grid doubles
        return self.last(F.silu(self.norm(y)))                            # (B,d,h,w)


def guided(net, label, w):
    """Classifier-free guidance: net(z_t, t) that exaggerates what the class changes, w times."""
    if label is None or w == 0:
        return lambda z_t, t: net(z_t, t)
    if w == 1:
        return lambda z_t, t: net(z_t, t, label)

    def both(z_t, t):               # the two answers in one pass
        none = torch.full_like(label, net.n_classes)
        a, b = net(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([none, label])).float().chunk(2)
        return a + w * (b - a)                                                                 # (14)
    return both


# ------------------------------------------------------------------------------------------------
# 12. Stage 2: latents and training
# ------------------------------------------------------------------------------------------------
# The frozen encoder turns each image into a latent once; after that stage 2 never sees a pixel.
# The diffusion assumes data of mean 0 and std 1: latents are brought there with the mean and std of
# the whole cache, and these two live in the checkpoint, since a latent is meaningless without them.


def standardise(z, scale):
    """z -> z0. scale: (2,d), mean and std of each channel. With unstandardise, the only two places
    where it is applied. trap: a copied constant, or one side forgotten, gives grey mush or noise."""
    return (z - scale[0].view(-1, 1, 1)) / scale[1].view(-1, 1, 1)


def unstandardise(z0, scale):
    """z0 -> z."""
    return z0 * scale[1].view(-1, 1, 1) + scale[0].view(-1, 1, 1)


@torch.no_grad()
def cache_latents(vqgan, images, views, cfg, device, dtype):
    """Encode every image in `views` of its 8 symmetries. -> (path of a float32 .npy with row
    view·N + image, scale (2,d)).

    trap: encoder outputs have heavy tails, single values at 12 to 26 std, and the network would
    spend itself on them. Only the nearest code of z counts in the end, so z is drawn towards its
    code until it is no further from it than most latents are: the same code, a tamer number."""
    weights = hashlib.blake2b(digest_size=8)
    for p in vqgan.state_dict().values():
        weights.update(p.cpu().numpy().tobytes())
    key = f"{images.fingerprint}-{weights.hexdigest()}-{views}-{dtype or 'fp32'}".replace("torch.", "")
    path = Path(cfg.cache) / f"latents-{key}.npy"
    scale_path = path.with_suffix(".json")
    if not (path.exists() and scale_path.exists()):
        make_folder(path.parent)
        N, is_train = len(images.names), torch.zeros(len(images.names), dtype=torch.bool)
        is_train[images.train] = True
        sums = torch.zeros(3, vqgan.codebook.embedding.embedding_dim, dtype=torch.float64)
        shape = (views * N, sums.shape[1], *[images.size // vqgan.f] * 2)
        with npy_writer(path, np.float32, shape) as write, \
                tqdm(total=views * N, desc="encoding latents", unit="img", disable=None, leave=False) as bar:
            for view in range(views):
                for idx in torch.arange(N).split(64):
                    x = images.batch(idx, torch.full((len(idx),), view)).to(device)
                    with autocast(device, dtype):
                        z = vqgan.codebook.settle(vqgan.encode(x)).cpu()
                    write(z.numpy())
                    z = z[is_train[idx]].double()
                    sums += torch.stack([torch.full((shape[1],), z[:, 0].numel()), z.sum((0, 2, 3)),
                                         z.square().sum((0, 2, 3))])
                    bar.update(len(idx))
        mean = sums[1] / sums[0]
        scale = torch.stack([mean, (sums[2] / sums[0] - mean ** 2).clamp(min=1e-12).sqrt()])
        write_whole(scale_path, lambda f: f.write(json.dumps(scale.tolist()).encode()))
    return path, torch.tensor(json.loads(scale_path.read_text()))


def update_ema(ema, net, step, decay):
    """ema <- d·ema + (1-d)·net.  trap: without warm-up of d, after 1,000 steps at 0.9999 the mean
    is 90 % initial weights, and samples are noise."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


def build_stage1(state, device, path):
    """A frozen VQGAN from a checkpoint's config and weights."""
    c = VQConfig(**state["config"])
    vqgan = load_weights(VQGAN(c.widths, c.z_dim, c.codes, c.heads), state["model"], path)
    return vqgan.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), c


def build_stage2(state, device, path):
    """-> (EMA UNet, Diffusion, VQGAN, its config, own config, scale on the device)."""
    cfg = LDMConfig(**state["config"])
    vqgan, vq_cfg = build_stage1(state["vq"], device, path)
    net = UNet(vq_cfg.z_dim, cfg.unet_widths, cfg.heads, len(state["classes"]) if state["conditional"] else 0)
    net = load_weights(net, state["ema"], path).to(device, memory_format=torch.channels_last).eval()
    return net, Diffusion(cfg.T, cfg.schedule, cfg.target), vqgan, vq_cfg, cfg, state["scale"].to(device)


@torch.no_grad()
def generate(net, diffusion, vqgan, scale, shape, numbers, label, s, device, dtype):
    """Images number `numbers` of seed s.seed: uint8 (n,3,H,W), and their latents z0 at each step.

    Image i has a random generator of its own, so it is the same image in any batch."""
    generators = [rng(s.seed, "sample", int(i)) for i in numbers]

    def noise():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    with autocast(device, dtype):
        path = list(diffusion.sample(guided(net, label, s.guidance), noise(), s.steps, s.sampler, s.eta, noise))
        x = vqgan.decode(unstandardise(path[-1][0], scale))
    return to_bytes(x.cpu()), path


def train_ldm(cfg, typed):
    run, cfg, device, dtype = start_stage(cfg, typed, "ldm")
    vq_state = run.state["vq"] if run.state else load_checkpoint(cfg.vq, ["vq"], "--vq")
    vqgan, vq_cfg = build_stage1(vq_state, device, cfg.vq)
    h = vq_cfg.size // vq_cfg.f
    if h % 2 ** len(cfg.unet_widths):
        raise UserError(f"--unet-widths: {len(cfg.unet_widths)} of them halve the {h}×{h} latents too often; "
                        f"this VQGAN allows {(h & -h).bit_length() - 1}")
    images = get_images(cfg, cfg.data or vq_cfg.data, vq_cfg)
    latents, scale = first_then_others(lambda: cache_latents(vqgan, images, cfg.views, cfg, device, dtype))
    diffusion = Diffusion(cfg.T, cfg.schedule, cfg.target)
    conditional = cfg.class_cond and len(images.classes) > 1
    n_classes = len(images.classes) if conditional else 0

    net = UNet(vq_cfg.z_dim, cfg.unet_widths, cfg.heads, n_classes).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    if run.state:
        load_weights(net, run.state["model"], run.folder), load_weights(ema, run.state["ema"], run.folder)
    params = list(net.parameters())
    opt = make_optimizer(params, cfg.lr, (0.9, 0.99))
    if run.state:
        opt.load_state_dict(run.state["opt"])
    forward = torch.compile(net) if cfg.compile else net

    n, B = len(images.train), cfg.batch_size
    total = math.ceil(cfg.epochs * n / B)
    say(f"UNet {count(net)} parameters, {h}×{h}×{vq_cfg.z_dim} latents, {n_classes or 'no'} classes; {cfg.epochs} "
        f"epochs = {total} steps of {B}; target {cfg.target}; writing to {run.folder}")
    shown = SampleConfig(seed=cfg.seed, steps=25)
    by_class = [(images.labels[images.train] == c).nonzero().flatten() for c in range(len(images.classes))]

    def read(indices, views):
        rows = torch.from_numpy(np.load(latents, mmap_mode="r")[(views * len(images.names) + indices).numpy()])
        return standardise(rows, scale)

    def state():
        return dict(model=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), scale=scale,
                    classes=images.classes, class_counts=[len(c) for c in by_class], conditional=conditional,
                    data=images.describe(), vq={k: vq_state[k] for k in ("kind", "config", "model", "data", "lpips")})

    def held_loss():
        """The loss on held-out latents in four bands of t, always with the same noise."""
        idx = images.held[:256]
        g = rng(cfg.seed, "held-out")
        z0, t = read(idx, 0).to(device), torch.arange(len(idx)) * cfg.T // len(idx)
        eps = torch.randn(z0.shape, generator=g).to(device)
        label = images.labels[idx].to(device) if conditional else None
        with torch.no_grad(), autocast(device, dtype):
            loss = torch.cat([diffusion.loss(ema, z0[i], t.to(device)[i], eps[i], None if label is None else label[i])
                              for i in torch.arange(len(idx)).split(64)]).cpu()
        return [float(loss[t * 4 // cfg.T == band].mean()) for band in range(4)]

    with run, progress_bar(run.step, total, "train-ldm") as bar:
        waited = 0.0
        for step in bar:
            elapsed, stop = run.clock(cfg)
            if stop:
                break
            # ---- learn ------------------------------------------------------------------------
            tick = time.monotonic()
            g = rng(cfg.seed, "step", step)
            chosen, epoch = batch_of(cfg.seed, step, B, n)
            if cfg.balance:
                some = torch.randint(len(by_class), (B,), generator=g).tolist()
                chosen = torch.stack([by_class[c][torch.randint(len(by_class[c]), (), generator=g)] for c in some])
            chosen, views = images.train[chosen], torch.randint(cfg.views, (B,), generator=g)
            # trap: t from 1…T-1 or 0…T-2 leaves a step that is sampled but was never trained.
            t = torch.randint(cfg.T, (B,), generator=g)
            eps = torch.randn((B, vq_cfg.z_dim, h, h), generator=g)
            label = torch.where(torch.rand(B, generator=g) < cfg.label_drop, n_classes, images.labels[chosen])
            z0 = read(share(chosen), share(views)).to(device)
            waited += time.monotonic() - tick
            t, eps, label = (share(v).to(device) for v in (t, eps, label))
            with autocast(device, dtype):
                loss = diffusion.loss(forward, z0, t, eps, label if conditional else None)     # (B,)
            opt.zero_grad(set_to_none=True)
            loss.mean().backward()
            factor = learning_rate(cfg, step, total, elapsed)
            if take_step(opt, params, factor, cfg.clip, run, loss=loss.mean()):
                update_ema(ema, net, step, cfg.ema)
            run.step = step + 1

            # ---- report -----------------------------------------------------------------------
            new_epoch = epoch > step * B // n or run.step == total
            look = new_epoch and keep_picture(epoch, cfg.epochs)
            if run.step % LOG_EVERY == 0 or look:
                row = dict(loss=float(loss.mean().detach()))
                run.log.append(dict(step=run.step, epoch=run.step * B / n, lr=cfg.lr * factor, **row))
                speed = (run.step - bar.initial) * B / (time.monotonic() - run.started)
                bar.set_postfix_str(f"epoch {epoch}/{cfg.epochs} loss {row['loss']:.3f} | {speed:.0f} img/s wait "
                                    f"{100 * waited / (time.monotonic() - run.started):.0f}% {memory_gb(device):.1f} GB",
                                    refresh=False)
            names = []
            if look and rank() == 0:
                bands = held_loss()
                mean = sum(bands) / 4
                run.log.append(dict(step=run.step, epoch=run.step * B / n, held_loss=mean,
                                    **{f"held_band{i}": v for i, v in enumerate(bands)}))
                if mean < run.best:
                    run.best = mean
                    names.append("best.pt")
                say(f"epoch {epoch:3d}  held out: loss {mean:.3f} (1.0 = predicts nothing); from little noise to "
                    f"much: " + " ".join(f"{v:.3f}" for v in bands))
                label = torch.arange(16) * len(images.classes) // 16
                x, _ = generate(ema, diffusion, vqgan, scale.to(device), (vq_cfg.z_dim, h, h), range(16),
                                label.to(device) if conditional else None, shown, device, dtype)
                draw_rows(run.folder / f"samples_epoch_{epoch:03d}.png", {f"epoch {epoch}": x[:8], " ": x[8:]})
                draw_curves(run.folder / "curves.png", run.log, "diffusion")
            if look or names or time.monotonic() - run.saved > SAVE_EVERY:
                run.save(cfg, ["last.pt", *names], **state())
        run.save(cfg, ["last.pt"], **state())
    return finish(run, cfg, total, None, f"python vqldm.py sample --ckpt {run.folder}")


# ------------------------------------------------------------------------------------------------
# 13. Pictures, samples, measurements
# ------------------------------------------------------------------------------------------------
# What a run leaves to look at, and the numbers that say how good it is. matplotlib is imported only
# here, where it is needed.


def figure(width, height):
    import matplotlib
    matplotlib.use("Agg")                   # files only: no window system needed
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save_figure(fig, path):
    write_whole(Path(path), lambda f: fig.savefig(f, format="png", metadata={"Software": None}))


def draw_rows(path, rows, per_line=8, title=None):
    """{label: uint8 images (n,3,H,W)} -> a picture with one labelled strip a row, without axes."""
    from torchvision.utils import make_grid
    rows = {k: v for k, v in rows.items() if len(v)}
    columns = min(per_line, max(len(v) for v in rows.values()))
    lines = [math.ceil(len(v) / columns) for v in rows.values()]
    scale = max(0.7, min(1.2, 10 / columns))
    fig = figure(columns * scale + 1.6, sum(lines) * scale + 0.1 + 0.3 * bool(title))
    axes = fig.subplots(len(rows), 1, squeeze=False, gridspec_kw=dict(height_ratios=lines))[:, 0]
    for ax, (label, images) in zip(axes, rows.items()):
        grid = make_grid(images, columns, padding=max(1, images.shape[2] // 32), pad_value=255)
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest" if images.shape[2] < 100 else None)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    if title:
        fig.suptitle(title, fontsize=11)
    save_figure(fig, path)


def draw_preview(path, images):
    rows = {c: images.rows(images.train[images.labels[images.train] == i][:8]) for i, c in enumerate(images.classes[:12])}
    draw_rows(path, rows, title=f"{images.source}: what the network sees")


def draw_curves(path, log, name):
    """Losses under the paper's names, measured values beside them."""
    def series(key):
        return zip(*[(r["step"], r[key]) for r in log if key in r])
    panels = {"VQGAN": [("losses", ("rec", "perc", "codebook", "commit"), True),
                        ("GAN", ("d_loss", "d_real", "d_fake", "g_adv"), False),
                        ("λ", ("lam",), True), ("held out: PSNR (dB)", ("held_psnr",), False),
                        ("held out: perplexity of the codes", ("held_perplexity",), False)],
              "diffusion": [("loss (1 = predicts nothing)", ("loss", "held_loss"), True),
                            ("held out, by band of t", [f"held_band{i}" for i in range(4)], True)]}[name]
    names = dict(rec="‖x − x̂‖²", perc="LPIPS", d_loss="D: hinge", d_real="D(real)", d_fake="D(fake)", g_adv="G: −D(fake)",
                 held_band0="least noise", held_band1=" ", held_band2="  ", held_band3="most noise",
                 loss="training", held_loss="held out")
    panels = [p for p in panels if any(k in r for k in p[1] for r in log)]
    if not panels:
        return
    fig = figure(4.2 * len(panels), 3)
    for ax, (title, keys, logarithmic) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for key in keys:
            if any(key in r for r in log):
                x, y = series(key)
                ax.plot(x, y, lw=1.2, marker="." if key.startswith("held") else None, label=names.get(key, key))
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            ax.set_yscale("log")
        if len(keys) > 1:
            ax.legend(fontsize=8, frameon=False)
    save_figure(fig, path)


@torch.no_grad()
def draw_codes(path, vqgan, images, device, dtype):
    """How often each code is used on held-out images, sorted; and the codes as colours."""
    usage = torch.zeros(len(vqgan.codebook.usage))
    for idx in images.held[:256].split(50):
        with autocast(device, dtype):
            k = vqgan.codebook.nearest(vqgan.encode(images.batch(idx).to(device)))
        usage += torch.bincount(k.flatten(), minlength=len(usage)).cpu()
    fig = figure(8, 2.6)
    ax = fig.subplots()
    ax.fill_between(range(len(usage)), usage.sort(descending=True).values / usage.sum() * 100, step="mid", color="#b5533c")
    ax.axhline(100 / len(usage), color="#555", lw=0.8, ls=":")
    ax.text(len(usage), 100 / len(usage), " equal use", fontsize=8, va="center")
    ax.set(xlabel="codes, most used first", ylabel="use (%)", xlim=(0, len(usage)), ylim=(0, None))
    ax.set_title(f"{int((usage > 0).sum())} of {len(usage)} codes used on {min(256, len(images.held))} held-out images",
                 fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(fig, path)


def labels_for(numbers, counts):
    """A class for each image number, in the training set's proportions whatever the number of images
    (golden-ratio steps through the cumulative counts)."""
    edges = torch.tensor(counts, dtype=torch.float64).cumsum(0) / sum(counts)
    u = (torch.as_tensor(numbers, dtype=torch.float64) * 0.6180339887498949 + 0.5) % 1
    return torch.searchsorted(edges, u, right=True).clamp(max=len(counts) - 1)


def prepare_output(folder, overwrite):
    folder = Path(folder)
    mine = [*folder.glob("*.png"), *folder.glob("*/[0-9]*.png")]
    if mine and not overwrite:
        raise UserError(f"--out {folder}: already holds pictures; add --overwrite to replace them, or give another --out")
    make_folder(folder)
    for p in mine:
        p.unlink()
    return folder


def write_png(path, x):
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)


def sample(cfg, typed):
    state = load_checkpoint(cfg.ckpt, ["ldm"], "--ckpt")
    classes = state["classes"] if state["conditional"] else []
    names = classes if cfg.class_ == "all" else [c.strip() for c in cfg.class_.split(",") if c.strip()]
    if cfg.class_ and not classes:
        raise UserError(f"--class {cfg.class_}: this model was trained without classes; leave --class out")
    for c in names:
        if c not in classes:
            raise UserError(f"--class {c}: must be one of {', '.join(classes)}, or all")
    T = state["config"]["T"]
    if cfg.steps > T:
        raise UserError(f"--steps {cfg.steps}: this model has T = {T} steps; give at most that")
    device, dtype, where = pick_device(cfg)
    say(where)
    net, diffusion, vqgan, vq_cfg, _, scale = build_stage2(state, device, cfg.ckpt)
    folder = prepare_output(cfg.out, cfg.overwrite)
    h = vq_cfg.size // vq_cfg.f
    labels = None
    total = cfg.n * max(1, len(names))
    if names:
        labels = torch.tensor([classes.index(c) for c in names]).repeat_interleave(cfg.n)
    elif classes:
        labels = labels_for(range(total), state["class_counts"])
    say(f"{total} images of {vq_cfg.size}×{vq_cfg.size}, {cfg.sampler} with {cfg.steps} steps"
        + (f", classes {', '.join(names or classes)}, guidance {cfg.guidance:g}" if classes else ""))
    shown, mean, std, done = {}, 0.0, 0.0, 0
    for c in names if cfg.class_ == "all" or len(names) > 1 else []:
        make_folder(folder / c)
    with tqdm(total=total, desc="sampling", unit="img", disable=None, leave=False) as bar:
        for numbers in torch.arange(total).split(32):
            label = None if labels is None else labels[numbers].to(device)
            x, path = generate(net, diffusion, vqgan, scale, (vq_cfg.z_dim, h, h), numbers, label, cfg, device, dtype)
            for i, image in zip(numbers.tolist(), x):
                c = classes[labels[i]] if labels is not None else ""
                sub = folder / c if len(names) > 1 or cfg.class_ == "all" else folder
                write_png(sub / f"{i:05d}.png", image)
                if len(shown.setdefault(c, [])) < (16 if classes else 64):
                    shown[c].append(image)
            if done == 0 and cfg.trajectory:
                draw_trajectory(folder / "trajectory.png", path, vqgan, scale, device, dtype)
            z0 = path[-1][0].float()
            mean, std = mean + float(z0.mean()) * len(x) / total, std + float(z0.std()) * len(x) / total
            done += len(x)
            bar.update(len(x))
    draw_rows(folder / "grid.png", {c: torch.stack(shown[c]) for c in sorted(shown)})
    say(f"samples' latents: mean {mean:+.2f}, std {std:.2f} (healthy: 0 and 1)")
    if abs(mean) > 0.2 or not 0.8 < std < 1.25:
        say("WARNING the latents are off: colours or contrast will be too. Train stage 2 longer, or more --steps")
    if cfg.nearest:
        images = get_images(cfg, state["config"]["data"] or vq_cfg.data, vq_cfg)
        draw_nearest(folder / "nearest.png", torch.stack([i for c in sorted(shown) for i in shown[c]][:8]), images)
    say(f"look at {folder / 'grid.png'}")
    return 0


@torch.no_grad()
def draw_trajectory(path, steps, vqgan, scale, device, dtype):
    """From noise to image: z_t and the current guess z0_hat of four images, decoded, at eight times."""
    at = [round(i * (len(steps) - 1) / 7) for i in range(8)] if len(steps) >= 8 else range(len(steps))
    rows = {}
    for i in range(min(4, len(steps[0][0]))):
        for name, which in (("z_t", 0), ("guess", 1)):
            z = torch.stack([steps[j][which][i] for j in at]).float()
            with autocast(device, dtype):
                rows[f"{i + 1}  {name}"] = to_bytes(vqgan.decode(unstandardise(z, scale)).float().cpu())
    draw_rows(path, rows, title="from noise (left) to image (right)")


def draw_nearest(path, x, images):
    """Each sample beside its five nearest training images in pixels: copies would show here."""
    best = [[] for _ in x]
    for idx in images.train.split(512):
        d = torch.cdist(x.flatten(1).float(), images.rows(idx).flatten(1).float())
        for i, row in enumerate(d):
            v, j = row.topk(min(5, len(idx)), largest=False)
            best[i] = sorted(best[i] + list(zip(v.tolist(), idx[j].tolist())))[:5]
    rows = {"sample": x}
    for r in range(min(5, min(map(len, best)))):
        rows[f"nearest {r + 1}"] = images.rows([b[r][1] for b in best])
    draw_rows(path, rows, title="samples above their nearest training images (pixel distance)")


def frechet(a, b):
    """Fréchet distance of two sets of features (n,C), as Gaussians (Heusel et al. 2017)."""
    ca, cb = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root)


def kernel_distance(a, b):
    """Unbiased squared MMD with a cubic kernel (Binkowski et al. 2018); less dependent on n."""
    def k(u, v): return (u @ v.T / u.shape[1] + 1) ** 3
    n, m, kaa, kbb = len(a), len(b), k(a, a), k(b, b)
    return float((kaa.sum() - kaa.trace()) / n / (n - 1) + (kbb.sum() - kbb.trace()) / m / (m - 1)
                 - 2 * k(a, b).mean())


def evaluate(cfg, typed):
    state = load_checkpoint(cfg.ckpt, ["ldm", "vq"], "--ckpt")
    device, dtype, where = pick_device(cfg)
    say(where)
    perceptual, _ = load_perceptual("auto", device)
    if state["kind"] == "vq":
        vqgan, vq_cfg = build_stage1(state, device, cfg.ckpt)
    else:
        net, diffusion, vqgan, vq_cfg, ldm_cfg, scale = build_stage2(state, device, cfg.ckpt)
    trained_on = state["config"]["data"] or vq_cfg.data
    images = get_images(cfg, cfg.data or trained_on, vq_cfg)
    own = cfg.data and cfg.data != trained_on        # a folder of its own: all of it is held out
    held = torch.cat([images.train, images.held]).unique() if own else images.held
    held = held[torch.randperm(len(held), generator=rng(cfg.seed, "evaluate"))]
    real, real2 = held[:cfg.n], held[cfg.n:2 * cfg.n]
    out = Path(cfg.out or (cfg.ckpt if Path(cfg.ckpt).is_dir() else Path(cfg.ckpt).parent))
    make_folder(out)
    m, x, x_hat = measure_vq(vqgan, images, real, perceptual, device, dtype)
    if state["kind"] == "vq":
        m.pop("rec")
        m["lpips"] = m.get("lpips")
        say(f"{len(real)} held-out images of {images.source}")
        for name, value in m.items():
            say(f"  {name:20} " + ("-" if value is None else f"{value:.3f}"))
        sets = {"real": x, "recon": x_hat}
        draw_rows(out / "evaluate.png", {"original": x[:16], "reconstruction": x_hat[:16]})
    else:
        s = SampleConfig(seed=cfg.seed, steps=min(cfg.steps, ldm_cfg.T))
        h, made, z0s = vq_cfg.size // vq_cfg.f, [], []
        labels = labels_for(range(len(real)), state["class_counts"]) if state["conditional"] else None
        for i in tqdm(torch.arange(len(real)).split(32), desc="sampling", disable=None, leave=False):
            label = None if labels is None else labels[i].to(device)
            y, path = generate(net, diffusion, vqgan, scale, (vq_cfg.z_dim, h, h), i, label, s, device, dtype)
            made.append(y)
            z0s.append(path[-1][0].float().cpu())
        fakes, z0 = torch.cat(made), torch.cat(z0s)
        m = dict(frechet=None, kernel=None, frechet_real=None, frechet_recon=None,
                 latent_mean=float(z0.mean()), latent_std=float(z0.std()), n=len(real))
        say(f"{len(real)} samples against {len(real)} held-out images of {images.source}")
        if perceptual:
            def features(u8):
                return torch.cat([perceptual.features(to_float(b.to(device))).cpu() for b in u8.split(32)])
            fr, ff, fx = features(x), features(fakes), features(x_hat)
            # The floor needs a second set of real images; where the held-out part is too small for
            # that, training images are the second set.
            second = real2 if len(real2) == len(real) else images.train[:len(real)]
            f2 = features(images.rows(second))
            m.update(frechet=frechet(fr, ff), kernel=kernel_distance(fr, ff),
                     frechet_real=frechet(fr, f2), frechet_recon=frechet(fr, fx))
            say(f"  {'':34}Fréchet   kernel   (in LPIPS-{perceptual.name} features; depends on n)")
            say(f"  {'real against real: the floor':34}{m['frechet_real']:7.1f} {kernel_distance(fr, f2):8.3f}")
            say(f"  {'reconstructions: this VQGAN at best':34}{m['frechet_recon']:7.1f} {kernel_distance(fr, fx):8.3f}")
            say(f"  {'samples':34}{m['frechet']:7.1f} {m['kernel']:8.3f}")
        say(f"  samples' latents: mean {m['latent_mean']:+.3f}, std {m['latent_std']:.3f} (healthy: 0 and 1)")
        sets = {"real": x, "samples": fakes}
        draw_rows(out / "evaluate.png", {"held out": x[:16], "samples": fakes[:16]})
    if cfg.save_images:
        for name, pictures in sets.items():
            make_folder(Path(cfg.save_images) / name)
            for i, image in enumerate(pictures):
                write_png(Path(cfg.save_images) / name / f"{i:05d}.png", image)
    write_whole(out / "metrics.json", lambda f: f.write(json.dumps(m, indent=1).encode()))
    say(f"numbers in {out / 'metrics.json'}, picture in {out / 'evaluate.png'}")
    return 0


# ------------------------------------------------------------------------------------------------
# 14. Commands
# ------------------------------------------------------------------------------------------------


def demo(cfg, typed):
    """The three commands in a row, as a user would type them."""
    started = time.monotonic()
    common = [w for name in ("seed", "device", "precision", "cache") if name in typed
              for w in (flag(name), str(typed[name]))] + ["--overwrite"] * cfg.overwrite
    at = {k: str(Path(cfg.out, k)) for k in ("vq", "ldm", "samples")}
    for words in (["train-vq", "--data", cfg.data, "--out", at["vq"], "--preset", cfg.preset],
                  ["train-ldm", "--vq", at["vq"], "--out", at["ldm"], "--preset", cfg.preset],
                  ["sample", "--ckpt", at["ldm"], "--out", at["samples"], "--nearest"]):
        say(f"\n$ python vqldm.py {' '.join(words)}")
        run_command(words + common)
    say(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes: {at['vq']} has the reconstructions, "
        f"{at['ldm']} the samples while training, {at['samples']} new images")
    return 0


def run_command(argv):
    command, cls, typed = parse_command(argv)
    cfg = settings(cls, typed)
    functions = {"train-vq": train_vq, "train-ldm": train_ldm, "sample": sample, "demo": demo, "evaluate": evaluate}
    return functions[command](cfg, typed)


def main(argv=None):
    """Run one command. Raises SystemExit: 2 after a user's mistake, 130 / 143 after a signal."""
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        code = run_command(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        text = str(e)
    except KeyboardInterrupt:
        text, code = "interrupted; finished checkpoints are untouched", 130
    except OSError as e:
        text = f"{e.strerror or e}: {e.filename or 'writing'}; the last checkpoint is untouched. Free some space or choose another folder"
    except (MemoryError, torch.OutOfMemoryError):
        text = "out of memory; use a smaller --batch-size, --size or --widths; the last checkpoint is untouched"
    except RuntimeError as e:
        if "memory" not in str(e):
            raise
        text = "out of memory; use a smaller --batch-size, --size or --widths; the last checkpoint is untouched"
    else:
        text = None
    if text is not None:
        if rank() == 0:
            print(f"vqldm: {text}", file=sys.stderr)
        code = locals().get("code", 2)
    if code:
        raise SystemExit(code)
    return 0


if __name__ == "__main__":
    main()
