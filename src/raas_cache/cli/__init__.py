"""The command line `raas-cache`: reads options and prints results. No other folder may import this folder."""

from .commands import app as app
