"""Make a low-rank edit and use it in plain diffusers, without Expunge."""

import sys
from pathlib import Path

import expunge
from expunge.methods.esd import ESD

model = expunge.load(sys.argv[1] if len(sys.argv) > 1 else "emoji")
edit = expunge.erase(model, expunge.Concept("bomb"), ESD(rank=4, steps=20), out=Path("run"))

pipe = model.pipe  # an ordinary StableDiffusionPipeline; elsewhere: StableDiffusionPipeline.from_pretrained(...)
pipe.load_lora_weights("run/lora", weight_name="pytorch_lora_weights.safetensors", adapter_name="no_bomb")
print("adapters:", pipe.get_list_adapters())
