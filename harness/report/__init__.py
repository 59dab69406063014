"""Research reports of runs, made from the run folders alone; no torch.

`runs` reads a folder, `claims` says what may and may not be concluded from it; `claim_file`, `measured` and
`judge` hold a person's claims against it; `figure` and `spans` draw curves and bars as SVG; `document` holds
the report's blocks, `markdown` and `html` print them, `report` puts them together.
"""
