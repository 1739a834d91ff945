# SPDX-License-Identifier: MIT
"""Measure a trained stage 2 on images that neither stage was trained on.

    python tools/evaluate.py --ckpt runs/ldm

The unseen images are split into two sets. The first is compared with its reconstructions, with
samples of its classes, and with the second set. docs/USING.md says what each number means."""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where vqldm.py lies
import vqldm
from vqldm import require, say


@dataclass(frozen=True)
class EvaluateConfig(vqldm.SampleConfig):
    """measure a trained stage 2 on images that it was not trained on"""

    out: str = ""  # folder for results. If empty: beside --ckpt
    data: str = ""  # folder of other images. Empty means those of --ckpt
    n: int = 500  # samples, and upper limit for each set of unseen images
    class_: str = ""  # measure only this class. Empty: all classes
    folders: str = ""  # new or empty folder for unseen images, reconstructions and samples, as PNGs


def features(lpips, pixels):
    """uint8 (n,3,H,W) -> (n,512), by LPIPS's network. (It favours models trained with LPIPS.)"""
    found = []
    for batch in pixels.split(4):
        x = vqldm.to_float(batch).to(lpips.scaling_layer.shift.device)
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        last = lpips.net(lpips.scaling_layer(x))[-1]  # SqueezeNet's last map, (B,512,13,13)
        found.append(last.mean((2, 3)))
    return torch.cat(found).cpu().double()


def kernel_distance(a, b):
    """Squared MMD of two sets of features (n,512), as in KID (arXiv 1801.01401): the mean kernel
    of pairs in a (high if alike), plus that of pairs in b, minus twice that of mixed pairs. For
    two random sets of 300 photographs it is 0 ± 1, and over 20 if one set lacks fine grain."""

    def kernel(u, v):  # (n,n)
        return (u @ v.T / u.shape[1] + 1) ** 3

    pairs = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    # Drop the diagonal, where an image meets itself or its own reconstruction.
    return float((pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1)))


def gap_and_chance(real, made, perfect):
    """Features (n,512) -> how far kernel is above kernel_perfect, and how far chance moves that:
    two standard deviations of the same difference on random halves of the images. (For sets that
    hardly differ, this is up to twice too much.)"""
    gaps = []
    for i in range(100):
        half = torch.randperm(len(real), generator=vqldm.rng("half", i))[: len(real) // 2]
        a, b, c = real[half], made[half], perfect[half]
        gaps.append(kernel_distance(a, b) - kernel_distance(a, c))
    gap = kernel_distance(real, made) - kernel_distance(real, perfect)
    return gap, 2 * float(torch.tensor(gaps).std())


def in_words(gap, chance, n):
    """What kernel means beside kernel_perfect, for two sets of n unseen images."""
    if n < 20:
        return f"{n} unseen images in each set are too few to tell how good the samples are"
    differ = f"by {abs(gap):.1f}, give or take {chance:.1f}"
    if abs(gap) <= chance:
        return f"{n} images are too few to tell kernel from kernel_perfect: they differ {differ}"
    if gap < 0:
        return f"kernel is below kernel_perfect {differ}: stage 1 needs more training"
    return f"kernel is above kernel_perfect {differ}. A perfect stage 2 would not be"


def nearest_trained(pictures, trained):
    """uint8 (n,3,H,W) -> the distance of each picture to its nearest training image, and which of
    trained (n_train,3,H,W) that is. They are compared at 32×32, in all eight symmetries."""

    def shrink(pixels):
        return F.interpolate(vqldm.to_float(pixels), (32, 32), mode="area")

    small = torch.cat([shrink(part) for part in pictures.split(256)]).flatten(1)  # (n,3072)
    best = torch.full((len(small),), math.inf)
    row = torch.zeros(len(small), dtype=torch.int64)
    for start in range(0, len(trained), 256):  # in parts, to save memory
        part = shrink(trained[start : start + 256])
        for symmetry in range(8):
            turned = vqldm.augment(part, [symmetry] * len(part)).flatten(1)
            distance, nearest = torch.cdist(small, turned).min(1)  # (n,) each
            row = torch.where(distance < best, start + nearest, row)
            best = torch.minimum(best, distance)
    return best, row


def unseen_images(cfg, model, images, seen):
    """Shuffled rows of the unseen images of wanted classes, and all labels in model's numbering"""
    number = {name: c for c, name in enumerate(model.classes)}
    label = torch.tensor([number.get(name, -1) for name in images.classes])[images.labels]
    wanted = torch.isin(label, vqldm.wanted_classes(cfg, model.classes))
    rows = (wanted & ~images.known(seen)).nonzero().flatten()
    say("to measure on:", len(rows), "unseen images of known classes:", images.count(rows))
    require(cfg.n > 1, f"--n {cfg.n}: must be at least 2, since pairs of images are compared")
    require(len(rows) > 3, f"--class, --data: {len(rows)} unseen images are too few, 4 are needed")
    if (n := min(cfg.n, len(rows) // 2)) < 20:
        say(f"WARNING each of the two sets has only {n} unseen images: distances are mostly chance")
    return rows[torch.randperm(len(rows), generator=vqldm.rng("unseen"))], label


def write_folders(where, sets):
    """Write each set of images, uint8 (n,3,H,W), as PNGs into a folder with its name."""
    for name, pixels in sets.items():
        folder = where / name
        folder.mkdir(parents=True)
        for i, image in enumerate(pixels):
            to_pil_image(image).save(folder / f"{i:05d}.png")


def evaluate(cfg, device, state):
    """Measure a stage 2 on images that no training has seen -> metrics.json, evaluate.png"""
    folder = cfg.folder if cfg.out else state["folder"]
    folders = Path(os.path.expanduser(cfg.folders))
    used = cfg.folders and folders.exists() and (not folders.is_dir() or any(folders.iterdir()))
    require(not used, f"--folders {folders}: is not empty; name a new folder")
    lpips = vqldm.load_lpips(device)
    model = vqldm.restore_ldm(state, device)
    data = replace(model.vqgan.cfg, data=cfg.data or model.cfg.data or model.vqgan.cfg.data)
    images = vqldm.read_images(data, folder, model.cfg.unconditional)
    measure(cfg, folder, model, images, state["seen"], state["step"], lpips)


def measure(cfg, folder, model, images, seen, step, lpips):
    """Measure a model that was trained on the images in seen. (baseline.py gives it diffusers'.)"""
    # ---- two sets of unseen images, and samples of the classes of the first ----
    unseen, label = unseen_images(cfg, model, images, seen)
    n = min(cfg.n, len(unseen) // 2)
    real, other = images.pixels[unseen[: 2 * n]].split(n)
    made, z0 = model.generate(cfg, range(cfg.n), label[unseen[torch.arange(cfg.n) % n]])
    measures, recon = vqldm.reconstruct(model.vqgan, real, lpips)
    measures.update(unseen_images=n, step=step, latent_std=float(z0.std()))
    strips = {"real": real, "recon": recon, "samples": made}
    if cfg.folders:
        write_folders(Path(os.path.expanduser(cfg.folders)), strips)

    # ---- kernel: distances from real. Samples of a perfect stage 2 would look like `other`,
    # encoded and decoded. So kernel_perfect is the best that kernel can reach. ----
    if lpips:
        _, perfect = vqldm.reconstruct(model.vqgan, other)
        # kernel_real differs from 0 by chance only.
        sets = {"kernel": made[:n], "kernel_perfect": perfect}
        sets |= {"kernel_recon": recon, "kernel_real": other}
        found = {name: features(lpips, pixels) for name, pixels in sets.items()}
        a = features(lpips, real)
        for name, b in found.items():
            measures[name] = kernel_distance(a, b)

    # ---- near copies: less than half the usual distance to a training image ----
    trained = images.pixels[torch.isin(images.checksum, seen)]
    measures["training_images_found"] = len(trained)
    if len(trained):
        distance, nearest = nearest_trained(made, trained)
        usual, _ = nearest_trained(images.pixels[unseen[:1000]], trained)
        limit = usual.median() / 2  # a few copies among the unseen don't move it
        for name, far in {"near_copies": distance, "near_copies_unseen": usual}.items():
            measures[name] = int((far < limit).sum())
            measures[name + "_percent"] = 100 * measures[name] / len(far)
        worst = distance.argsort()[:16]
        strips["samples nearest to a training image"] = made[worst]
        strips["that image"] = trained[nearest[worst]]

    # ---- all numbers, the picture, and the numbers in words ----
    for name, value in measures.items():
        say(f"{name:27}{value:10.4g}")
    vqldm.draw_rows(folder / "evaluate.png", strips)
    settings = {name: value for name, value in asdict(cfg).items() if name != "folders"}
    (folder / "metrics.json").write_text(json.dumps({**settings, **measures}, indent=1))
    say("look at", folder / "evaluate.png", "and metrics.json")
    if lpips:
        say(in_words(*gap_and_chance(a, found["kernel"], found["kernel_perfect"]), n))


def main(argv):
    vqldm.COMMANDS["evaluate"] = EvaluateConfig, evaluate
    vqldm.main(["evaluate", *argv], "tools/evaluate.py")


if __name__ == "__main__":
    main(sys.argv[1:])
