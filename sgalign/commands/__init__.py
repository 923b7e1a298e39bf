"""The command line. Nothing else imports these modules.

`main` chooses the command. Each other module is one command of its name, but for three: `lightning_cli` is fit,
validate, test and `predict --config`; `studies` is what `ablate` and `report` share; `mirror_figure` is a figure of
`report`.
"""
