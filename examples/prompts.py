"""A concept is a distribution of prompts: see what will be erased, and towards what. Needs no model and no torch."""

import expunge

concept = expunge.Concept(
    "bomb",
    synonyms=("explosive",),
    anchor="soccer ball",
    templates=("{c}", "a photo of {c}", "{c} on a table"),
)
for prompt, anchor in zip(concept.prompts(), concept.anchors(), strict=True):
    print(f"{prompt:30} -> {anchor}")
