"""The command line `raas-cache`: it reads options and prints results. No other folder may import this one."""

from .commands import app as app
