"""The command line. The rest of the package does not import these modules.

`main` chooses the command. Most other modules implement one command and are named after it. There are three
exceptions: `lightning_cli` runs `fit`, `validate`, `test` and `predict --config`, `studies` is shared by `ablate` and
`report`, and `mirror_figure` draws a figure for `report`.
"""
