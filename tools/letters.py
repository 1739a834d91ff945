# SPDX-License-Identifier: MIT
"""Draw 4,096 coloured letters of eight classes, in folders below letters/

    python tools/letters.py

They are the same in every run. To train on them and to make new ones, type

    python vqldm.py train-vq --data letters --augment none --epochs 2 --out runs/letters-vq
    python vqldm.py train-ldm --vq runs/letters-vq --epochs 24 --out runs/letters-ldm
    python vqldm.py sample --ckpt runs/letters-ldm --out runs/letters-samples"""

import argparse
import random
import sys
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where vqldm.py lies
import vqldm


def draw_letters(folder, n=512):
    """Draw n of each letter, in a folder of its own."""
    chance = random.Random(0)

    def colour(low, high):
        return tuple(chance.randint(low, high) for _ in "rgb")

    fonts = []  # sixteen of those that come with matplotlib
    for path in sorted(Path(get_data_path(), "fonts/ttf").glob("*.ttf")):
        if path.name.startswith(("DejaVu", "STIXGeneral")) and "Display" not in path.name:
            fonts.append(path)
    for letter in "ABEFGKPR":
        Path(folder, letter).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            paper, ink = colour(200, 255), colour(0, 140)
            font = ImageFont.truetype(chance.choice(fonts), chance.randint(72, 112))
            centre = chance.randint(54, 74), chance.randint(54, 74)
            image = Image.new("RGB", (128, 128), paper)
            ImageDraw.Draw(image).text(centre, letter, ink, font, anchor="mm")
            angle = chance.uniform(-10, 10)
            image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=paper)
            image.save(Path(folder, letter, f"{i:03d}.png"))


def main(argv=None):
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools/letters.py", None, __doc__, formatter_class=about)
    parser.error = lambda text: vqldm.require(False, text)  # one sentence, without the usage
    with vqldm.one_sentence():
        parser.parse_args(argv)
        draw_letters("letters")
        vqldm.say("drew 4,096 letters, in folders below letters/")


if __name__ == "__main__":
    main()
