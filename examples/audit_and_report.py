"""Erase, prove it on the protocol `emoji-v1`, and write the report: what `expunge demo` does."""

from pathlib import Path

import expunge
from expunge.auditing import audit
from expunge.methods.sdd import SDD
from expunge.report import build

run = Path("run")
expunge.erase(expunge.load("emoji"), expunge.Concept("bomb"), SDD(steps=20), out=run)
for score in audit(run, protocol="emoji-v1"):
    print(f"{score.metric:18} {score.value}  [{score.low}, {score.high}]  n={score.n}")
Path("report.html").write_text(build([expunge.Run.open(run)]))
