"""The command line. The rest of the package does not import these modules.

`main` chooses the command. The other modules implement one command each and are named after it, except for
`reading_options`, which has options that several commands share. `sgalign.training.lightning_cli` has `fit`,
`validate`, `test` and `predict --config`.
"""
