# SPDX-License-Identifier: MIT
"""Do a run's job with another program, diffusers, and measure it in the same way.

    pip install diffusers
    python tools/baseline.py --like runs/ldm --minutes 5 9 --tuned

It trains diffusers' VQModel, then its UNet2DModel on the codes, on the images that the run was
trained on, in the same symmetries. Then tools/evaluate.py measures it on the same unseen images.
--out gets metrics.json, evaluate.png, and grid.png with samples by class.

Without --tuned, rates, batches and noise are those of diffusers' training examples, with narrower
networks, and without the VGG and the discriminator of its VQGAN. --tuned is what somebody changes
who knows the field. LPIPS, Muon, and how its codes restart and learn are then taken from vqldm."""

import argparse
import copy
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where evaluate.py lies
import evaluate  # which finds vqldm.py
import vqldm

try:
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel, VQModel
except ImportError:
    VQModel = None  # main says so, after --help


def cosine(step, progress):  # as diffusers' schedule of this name, with its warm-up
    return min(1, step / 500) * (1 + math.cos(math.pi * progress)) / 2


PLAIN = {
    "vq": dict(block_out_channels=(64, 64, 64), num_vq_embeddings=256),
    "unet": dict(block_out_channels=(128, 128, 256)),
    "noise": dict(beta_schedule="linear", prediction_type="epsilon"),
    "batch": (16, 16),
    "adam": (dict(lr=1e-4), dict(lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)),
    "codes_lr": 1e-4,
    "rate": (lambda step, progress: 1, cosine),
    "ema": 0.9999,
}
BETAS = dict(betas=(0.9, 0.99), weight_decay=0)
NORM = dict(norm_num_groups=1, resnet_time_scale_shift="scale_shift")  # as in vqldm
LAST = dict(timestep_spacing="trailing")  # so that sampling begins at the last level
TUNED = {  # with latents as fine as vqldm's: f = 4, and 2048 codes of length 3
    "vq": dict(block_out_channels=(16, 64, 64), num_vq_embeddings=2048, norm_num_groups=4),
    "unet": dict(block_out_channels=(64, 64, 128), layers_per_block=1, **NORM),
    "noise": dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **LAST),
    "batch": (8, 32),
    "adam": (dict(lr=1e-3, **BETAS), dict(lr=2e-3, **BETAS)),
    "codes_lr": 1e-2,
    "rate": (vqldm.lr_factor, vqldm.lr_factor),
    "ema": 0.995,
}


def clock(minutes, device, name):
    """Yield each step's number and the share of the minutes that has passed: minutes of the
    processor, its threads added up, but beside a GPU those of the wall."""
    now = time.process_time if device.type == "cpu" else time.perf_counter
    start, seconds, step = now(), 60 * minutes, 0
    with vqldm.bar(None, name, round(seconds)) as line:
        while (passed := now() - start) < seconds:
            line.update(int(passed) - line.n)
            yield step, passed / seconds
            step += 1
    vqldm.require(step, f"--minutes: too few for a step of {name}")
    vqldm.say(name, "took", step, "steps")


class Coder(torch.nn.Module):
    """Stage 1: a VQModel with the functions of a VQGAN that vqldm's own functions call"""

    def __init__(self, form):
        super().__init__()
        down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
        self.net = VQModel(down_block_types=down, up_block_types=up, **form["vq"])
        self.codebook = self.net.quantize
        self.codebook.legacy = form is PLAIN  # its two losses have each other's weights
        self.codebook.register_buffer("wins", torch.zeros(self.codebook.n_e))

    def latents(self, x):  # (B,3,H,W) -> z (B,d,h,w)
        with vqldm.mixed_precision(x):
            return self.net.encode(x).latents.float()

    def pixels(self, z_q):  # and back
        with vqldm.mixed_precision(z_q):
            return self.net.decode(z_q, force_not_quantize=True).sample.float()

    def encode(self, x):  # -> code numbers k (B,h,w)
        return vqldm.Codebook.nearest(self.codebook, self.latents(x))

    def decode(self, k):
        return self.pixels(vqldm.Codebook.lookup(self.codebook, k))


def train_coder(form, images, train, symmetries, lpips, args, device):
    coder = vqldm.place(Coder(form), device)
    codebook, others = coder.codebook, dict(coder.named_parameters())
    inner = [n for n, p in others.items() if form is TUNED and p.ndim == 4 and "block" in n]
    optimizers = [vqldm.Muon([others.pop(n) for n in inner], 0.02)] if inner else []
    codes = {"params": [others.pop("net.quantize.embedding.weight")], "lr": form["codes_lr"]}
    optimizers.append(torch.optim.AdamW([{"params": others.values()}, codes], **form["adam"][0]))
    for step, progress in clock(args.minutes[0], device, "stage 1"):
        rows = train[vqldm.next_rows(len(train), step, form["batch"][0], args.seed)]
        turns = torch.tensor(symmetries)[torch.randint(len(symmetries), (len(rows),))]
        x = vqldm.augment(vqldm.to_float(images.pixels[rows]), turns).to(device)
        z = coder.latents(x)
        if form is TUNED and step % 50 == 0:
            vqldm.Codebook.restart_unused(codebook, z, vqldm.rng(args.seed, "restart", step))
        z_q, loss, (_, _, k) = codebook(z)
        x_hat = coder.pixels(z_q)
        loss = loss + F.mse_loss(x_hat, x)
        if form is TUNED and lpips:
            loss = loss + 0.1 * lpips(x_hat, x).mean()
        vqldm.descend(loss, coder, form["rate"][0](step, progress), *optimizers)
        vqldm.Codebook.count_wins(codebook, k)
    return coder.requires_grad_(False)


class Model:
    """Stage 2: a UNet2DModel for the codes k (n,V,h,w), and what tools/evaluate.py calls"""

    def __init__(self, form, coder, k, classes, device):
        self.form, self.vqgan, self.classes, self.device = form, coder, classes, device
        vectors = coder.codebook.embedding(k.flatten().to(device))  # (N,d)
        self.std, self.mean = [x.view(-1, 1, 1) for x in torch.std_mean(vectors, 0)]
        self.shape = d, side, _ = len(self.std), *k.shape[2:]
        kinds = dict(down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3)
        shape = dict(sample_size=side, in_channels=d, out_channels=d)
        # The class after the last stands for an unknown one, for guidance.
        net = UNet2DModel(**kinds, **shape, **form["unet"], num_class_embeds=len(classes) + 1)
        self.net = vqldm.place(net, device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

    def answer(self, net, z_t, t, label):
        with vqldm.mixed_precision(z_t):
            return net(z_t, t, label).sample.float()

    def train(self, k, labels, args):
        form, codebook = self.form, self.vqgan.codebook
        noise = DDPMScheduler(1000, **form["noise"])
        adam = torch.optim.AdamW(self.net.parameters(), **form["adam"][1])
        for step, progress in clock(args.minutes[1], self.device, "stage 2"):
            rows = vqldm.next_rows(len(k), step, n := form["batch"][1], args.seed)
            chosen = k[rows, torch.randint(k.shape[1], (n,))].to(self.device)
            z0 = (vqldm.Codebook.lookup(codebook, chosen) - self.mean) / self.std
            label = labels[rows].masked_fill(torch.rand(n) < 0.1, len(self.classes))
            t = torch.randint(1000, (n,)).to(self.device)
            eps = torch.randn(z0.shape).to(self.device)
            goal = eps if form is PLAIN else noise.get_velocity(z0, eps, t)
            out = self.answer(self.net, noise.add_noise(z0, eps, t), t, label.to(self.device))
            vqldm.descend(F.mse_loss(out, goal), self.net, form["rate"][1](step, progress), adam)
            vqldm.update_ema(self.ema, self.net, step, form["ema"])
        return step + 1

    def generate(self, settings, ids, label):
        """-> new uint8 images (n,3,H,W) of the classes label (n,), and their latents (n,d,h,w)"""
        ddim = DDIMScheduler(1000, clip_sample=False, **self.form["noise"])
        ddim.set_timesteps(settings.steps)
        noise = torch.randn(len(label), *self.shape, generator=vqldm.rng(settings.seed, "sample"))
        w, made = settings.class_guidance, []
        for z, classes in vqldm.bar([*zip(noise.split(32), label.split(32))], "sampling"):
            z, classes = z.to(self.device), classes.to(self.device)
            for t in ddim.timesteps:
                out = self.answer(self.ema, z, t, classes)
                if w != 1:
                    no_class = torch.full_like(classes, len(self.classes))
                    out = out + (w - 1) * (out - self.answer(self.ema, z, t, no_class))
                z = ddim.step(out, t, z).prev_sample
            x = self.vqgan.net.decode(z * self.std + self.mean).sample  # by the nearest codes
            made.append((vqldm.to_bytes(x), z.cpu()))
        return [torch.cat(part) for part in zip(*made)]


def baseline(args):
    """Train both stages on the images of the run --like, measure them, and draw samples."""
    form, device = TUNED if args.tuned else PLAIN, vqldm.pick_device(args.device)
    state = vqldm.load_checkpoint(args.like, "--like", "ldm")
    run = vqldm.restore_ldm(state, device)
    data = replace(run.vqgan.cfg, data=run.cfg.data or run.vqgan.cfg.data)
    vqldm.require(data.size % 16 == 0, "--like: diffusers' UNet halves sizes that 16 divides only")
    images = vqldm.read_images(data, state["folder"], run.cfg.unconditional)
    train, _, seen = vqldm.split(images, data.held_out, state["seen"])
    lpips = vqldm.load_lpips(device)
    torch.manual_seed(args.seed)
    symmetries = vqldm.SYMMETRIES[data.augment]
    coder = train_coder(form, images, train, symmetries, lpips, args, device)
    kept = symmetries[: max(1, 20_000 // len(images.labels))]  # as in train_ldm
    coder.cfg = data  # whose batch size is used to encode
    k = vqldm.encode_images(coder, images.pixels, train, kept)
    model = Model(form, coder, k, run.classes, device)
    step = model.train(k, images.labels[train], args)
    how = dict(ckpt=args.like, out=args.out, seed=args.seed, autoguidance=1)  # it has none
    cfg = evaluate.EvaluateConfig(**how, class_guidance=args.class_guidance)
    evaluate.measure(cfg, cfg.folder, model, images, seen, step, lpips)
    label = torch.arange(64) % len(run.classes)
    made, _ = model.generate(cfg, range(64), label)
    rows = {name: made[label == c] for c, name in enumerate(run.classes)}
    vqldm.draw_rows(cfg.folder / "grid.png", rows)


def main(argv=None):
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools/baseline.py", None, __doc__, formatter_class=about)
    parser.error = lambda text: vqldm.require(False, text)  # one sentence, without the usage
    add = parser.add_argument
    add("--like", required=True, help="a run of train-ldm, whose images are used")
    add("--minutes", required=True, type=float, nargs=2, help="processor minutes of each stage")
    add("--tuned", action="store_true", help="instead of plain, see above")
    add("--class-guidance", type=float, default=1, help="CFG, as in vqldm.py sample [1]")
    add("--seed", type=int, default=0, help="random seed [0]")
    add("--out", default="runs/baseline", help="folder for results [runs/baseline]")
    add("--device", default="auto", help="auto, or a device of torch, such as cpu or cuda:1")
    with vqldm.one_sentence():
        args = parser.parse_args(argv)
        enough = all(0.01 <= minutes < math.inf for minutes in args.minutes)
        vqldm.require(enough, "--minutes: must be finite, and long enough for a step")
        out = Path(args.out)
        vqldm.require(not out.exists() or out.is_dir(), f"--out {out}: is a file")
        vqldm.require(not any(out.glob("*")), f"--out {out}: is not empty")
        vqldm.require(VQModel, "diffusers is missing: type pip install diffusers")
        out.mkdir(parents=True, exist_ok=True)
        baseline(args)


if __name__ == "__main__":
    main()
