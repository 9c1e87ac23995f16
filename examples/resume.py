"""Stop an erasure in the middle and go on: the edit is the one an undisturbed run makes, bit for bit."""

import sys
from pathlib import Path

import torch

import expunge
from expunge.methods.esd import ESD

model = expunge.load(sys.argv[1] if len(sys.argv) > 1 else "emoji")
concept, method = expunge.Concept("bomb"), ESD(steps=12)


def stop(step):
    if step.i == 5:
        raise KeyboardInterrupt


try:
    expunge.erase(model, concept, method, seed=0, out=Path("run"), save_every=0, progress=stop)
except KeyboardInterrupt:
    print("stopped after six updates")
resumed = expunge.erase(model, concept, method, seed=0, out=Path("run"), resume=True).tensors()
whole = expunge.erase(model, concept, method, seed=0).tensors()
print("identical:", all(torch.equal(resumed[name], whole[name]) for name in whole))
