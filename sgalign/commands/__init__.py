"""The command line: `main` chooses the command; every other module is one command. Nothing else imports these."""
