"""Erase an object from a model and draw it before and after, from the same noise."""

import sys

from PIL import Image

import expunge
from expunge.methods.sdd import SDD

model = expunge.load(sys.argv[1] if len(sys.argv) > 1 else "emoji")
prompts, seeds = ["an emoji of bomb"] * 4, range(4)

before = model.generate(prompts, seeds=seeds)
edit = expunge.erase(model, expunge.Concept("bomb"), SDD(steps=50), seed=0)
with edit.on(model):
    after = model.generate(prompts, seeds=seeds)

rows = [(p.permute(1, 2, 0) * 255).round().byte().numpy() for p in (*before, *after)]
side = rows[0].shape[0]
sheet = Image.new("RGB", (4 * side, 2 * side))
for i, picture in enumerate(rows):
    sheet.paste(Image.fromarray(picture), (i % 4 * side, i // 4 * side))
sheet.save("before-and-after.png")
print("before-and-after.png: the first row is the base model, the second the edited one")
