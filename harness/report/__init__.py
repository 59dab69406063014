"""Research reports of runs, made from the run folders alone; no torch.

`runs` reads a folder, or takes what was `verified`; `facts` and `statistics` say what
may and may not be concluded from it. `study` is everything that a report is about, its runs in `arms`. A
person's claims (`claim_file`) are held by `judge` against what was `measured`.

`report` puts the sections together: `argument`, `setup`, `data`, `pictures`, `evaluations`, `artefacts`,
`costs`, `checklist`. They are blocks of `document`, which `markdown` and `html` print; `figure` draws
`curves` and `spans` bars, as SVG. `frame` is one screen of a run under way.
"""
