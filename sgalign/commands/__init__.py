"""The command line. No other layer imports these modules.

`main` chooses the command. Most other modules are one command each and have its name. There are three exceptions:
`lightning_cli` runs `fit`, `validate`, `test` and `predict --config`, `studies` is shared by `ablate` and `report`, and
`mirror_figure` draws a figure for `report`.
"""
