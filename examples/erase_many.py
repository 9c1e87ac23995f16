"""Erase several concepts at once, in closed form, and keep some on purpose."""

import sys

import expunge
from expunge.methods.uce import UCE

model = expunge.load(sys.argv[1] if len(sys.argv) > 1 else "emoji")
unwanted = [
    expunge.Concept("bomb", anchor="soccer ball", keep=("party popper",)),
    expunge.Concept("dagger", anchor="tomato"),
    expunge.Concept("cigarette"),
]
edit = expunge.erase(model, unwanted, UCE(), seed=0)
edit.save("three-concepts.safetensors")
print(f"{len(unwanted)} concepts, {len(edit.tensors())} changed weights, saved as three-concepts.safetensors")
