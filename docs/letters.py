"""Draw 4,096 coloured letters of eight classes, in folders below letters/

    python docs/letters.py
"""
import random
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

chance = random.Random(0)
folder = Path(get_data_path(), "fonts/ttf")     # sixteen of the fonts that come with matplotlib
fonts = [path for path in sorted(folder.glob("*.ttf"))
         if path.name.startswith(("DejaVu", "STIXGeneral")) and "Display" not in path.name]


def colour(low, high):
    return tuple(chance.randint(low, high) for _ in "rgb")


for letter in "ABEFGKPR":
    Path("letters", letter).mkdir(parents=True, exist_ok=True)
    for i in range(512):
        paper, ink = colour(200, 255), colour(0, 140)
        font = ImageFont.truetype(chance.choice(fonts), chance.randint(72, 112))
        centre = chance.randint(54, 74), chance.randint(54, 74)
        image = Image.new("RGB", (128, 128), paper)
        ImageDraw.Draw(image).text(centre, letter, ink, font, anchor="mm")
        image = image.rotate(chance.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=paper)
        image.save(f"letters/{letter}/{i:03d}.png")
print("drew 4,096 letters, in folders below letters/")
